"""Programs made by hand for the tests of cost and search: models by measure, clusters by number."""

from __future__ import annotations

from llmspec.dsl.program import (
    Arithmetic,
    Assign,
    Binding,
    Block,
    BlockUse,
    Budget,
    Call,
    Cluster,
    Constraint,
    Device,
    DeviceKind,
    Every,
    Model,
    Operator,
    Prefer,
    Program,
    Ref,
    Relation,
    Repeat,
    Span,
    Train,
)

HERE = Span("test.llmspec", 1, 1, 1, 1)
GiB = 2**30


def operator(name: str, *inputs, operator: str | None = None, **options):  # type: ignore[no-untyped-def]
    return Operator(
        operator=operator or name,
        name=name,
        inputs=tuple(inputs),
        options=tuple(sorted(options.items())),
        span=HERE,
    )


def plus(left, right):  # type: ignore[no-untyped-def]
    return Arithmetic(op="+", left=left, right=right, span=HERE)


def assign(value):  # type: ignore[no-untyped-def]
    return Assign(target="x", value=value, span=HERE)


def llama(
    *, layers: int, width: int, heads: int, kv_heads: int, ffn: int, vocab: int, context: int
) -> Model:
    x = Ref("x")
    norm = {"eps": 1e-5, "width": width}
    layer = Block(
        name="layer",
        inputs=("x",),
        span=HERE,
        body=(
            assign(
                plus(
                    x,
                    operator(
                        "attention",
                        operator("rmsnorm", x, **norm),
                        heads=heads,
                        kv_heads=kv_heads,
                        head_size=width // heads,
                        rope=10_000,
                        causal=True,
                        bias=False,
                        window=None,
                        explicit=False,
                        dropout=0.0,
                        qk_norm=None,
                    ),
                )
            ),
            assign(
                plus(
                    x,
                    operator(
                        "swiglu",
                        operator("rmsnorm_2", x, operator="rmsnorm", **norm),
                        ffn=ffn,
                        width=width,
                    ),
                )
            ),
        ),
    )
    body = (
        Binding(
            name="embed",
            value=operator(
                "embed",
                Ref("tokens"),
                vocab=vocab,
                width=width,
                context=context,
                positions="none",
            ),
        ),
        _layers(layers, "embed"),
        Binding(name="rmsnorm", value=operator("rmsnorm", Ref("layers"), **norm)),
        Binding(
            name="unembed",
            value=operator("unembed", Ref("rmsnorm"), vocab=vocab, tied=None, bias=False),
        ),
    )
    return _model("llama", vocab, context, width, layer, body)


def gpt(*, layers: int, width: int, heads: int, vocab: int, context: int, p: float = 0.1) -> Model:
    x = Ref("x")
    norm = {"eps": 1e-5, "width": width, "bias": True}
    attention = operator(
        "attention",
        operator("layernorm", x, **norm),
        heads=heads,
        kv_heads=heads,
        head_size=width // heads,
        rope=None,
        causal=True,
        bias=True,
        window=None,
        explicit=False,
        dropout=0.0,
        qk_norm=None,
    )
    mlp = operator(
        "mlp",
        operator("layernorm_2", x, operator="layernorm", **norm),
        ffn=4 * width,
        activation="gelu",
        bias=True,
        width=width,
    )
    layer = Block(
        name="layer",
        inputs=("x",),
        span=HERE,
        body=(
            assign(plus(x, operator("dropout", attention, p=p))),
            assign(plus(x, operator("dropout_2", mlp, operator="dropout", p=p))),
        ),
    )
    body = (
        Binding(
            name="embed",
            value=operator(
                "embed",
                Ref("tokens"),
                vocab=vocab,
                width=width,
                context=context,
                positions="learned",
            ),
        ),
        _layers(layers, "embed"),
        Binding(name="layernorm", value=operator("layernorm", Ref("layers"), **norm)),
        Binding(
            name="unembed",
            value=operator("unembed", Ref("layernorm"), vocab=vocab, tied="embed", bias=False),
        ),
    )
    return _model("gpt", vocab, context, width, layer, body)


def _layers(count: int, source: str) -> Binding:
    use = BlockUse(block="layer", name="layer", inputs=(Ref(""),), span=HERE)
    return Binding(
        name="layers", value=Repeat(count=count, body=(use,), input=Ref(source), span=HERE)
    )


def _model(
    name: str, vocab: int, context: int, width: int, layer: Block, body: tuple[Binding, ...]
) -> Model:
    return Model(
        name=name,
        vocab=vocab,
        context=context,
        width=width,
        inputs=("tokens",),
        blocks=(layer,),
        body=body,
        span=HERE,
    )


def tiny_llama(layers: int = 4) -> Model:
    return llama(layers=layers, width=64, heads=4, kv_heads=2, ffn=128, vocab=256, context=32)


def tiny_gpt(layers: int = 4) -> Model:
    return gpt(layers=layers, width=64, heads=4, vocab=257, context=32)


LLAMA3 = {
    "8b": {"layers": 32, "width": 4096, "heads": 32, "kv_heads": 8, "ffn": 14336},
    "70b": {"layers": 80, "width": 8192, "heads": 64, "kv_heads": 8, "ffn": 28672},
    "405b": {"layers": 126, "width": 16384, "heads": 128, "kv_heads": 8, "ffn": 53248},
}


def llama3(size: str, context: int = 8192) -> Model:
    return llama(**LLAMA3[size], vocab=128_256, context=context)


H100 = Device(
    name="H100-SXM",
    kind=DeviceKind.GPU,
    memory_bytes=80 * GiB,
    usable_bytes=int(79.11 * GiB),
    memory_bytes_per_s=3.35e12,
    peak_flops={"bf16": 989e12, "fp8": 1979e12, "tf32": 494.5e12, "fp32": 67e12},
    link_bytes_per_s=450e9,
    host_link_bytes_per_s=63e9,
    price_per_hour=None,
    constants={},
)

CPU = Device(
    name="cpu",
    kind=DeviceKind.CPU,
    memory_bytes=12 * GiB,
    usable_bytes=12 * GiB,
    memory_bytes_per_s=10e9,
    peak_flops={"fp32": 5e10},
    link_bytes_per_s=1e9,
    host_link_bytes_per_s=None,
    price_per_hour=None,
    constants={},
)


def cluster(nodes: int, per_node: int = 8, device: Device = H100) -> Cluster:
    return Cluster(
        host_memory_bytes=2**41,
        name="pod",
        device=device,
        devices_per_node=per_node,
        nodes=nodes,
        network_bytes_per_s=50e9,
        span=HERE,
    )


def pin(key: str, *values, relation: Relation = Relation.EQ) -> Constraint:  # type: ignore[no-untyped-def]
    return Constraint(key=key, relation=relation, values=values, span=HERE)


def program(
    model: Model,
    where: Cluster,
    *,
    batch: int,
    sequence: int | None = None,
    memory: int | None = None,
    precision: str = "bf16",
    plan: tuple[Constraint, ...] = (),
) -> Program:
    train = Train(
        name="pretrain",
        dataset=Call(name="synthetic", span=HERE),
        sequence_length=sequence or model.context,
        batch_sequences=batch,
        steps=100,
        tokens=None,
        optimizer=Call(name="adamw", options=(("clip", 1.0), ("lr", 3e-4)), span=HERE),
        learning_rate=(),
        precision=Call(name=precision, span=HERE),
        objective=Call(name="next_token", span=HERE),
        validate=None,
        checkpoint=None,
        log=Every(steps=1),
        seed=1,
        span=HERE,
    )
    return Program(
        path="test.llmspec",
        folder=".",
        source_hash="0123456789ab",
        model=model,
        cluster=where,
        train=train,
        budget=Budget(memory_bytes=memory or where.device.usable_bytes),
        plan=plan,
        prefer=Prefer.THROUGHPUT,
    )
