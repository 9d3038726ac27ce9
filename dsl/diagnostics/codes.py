"""Every code: its headline here, its longer story in pages/CODE.md."""

from __future__ import annotations

from pathlib import Path

from llmspec.dsl.diagnostics import did_you_mean

CODES = {
    # the files themselves
    "E0001": "a file cannot be read",
    "E0002": "a spec is empty",
    "E0003": "a file is not text",
    "E0004": "a file is too large",
    "E0005": "something is nested too deep",
    "E0006": "a file is missing",
    "E0007": "files import each other in a circle",
    "E0008": "the library has no such file",
    # syntax
    "E0101": "a word or sign does not belong where it stands",
    "E0102": "brackets do not pair",
    "E0103": "a string is not closed on its line",
    # models
    "E0201": "a name is not known",
    "E0202": "an option is not known",
    "E0203": "the heads do not divide the width",
    "E0204": "the key/value heads do not divide the heads",
    "E0205": "something required is not given",
    "E0206": "a value is of the wrong kind",
    "E0207": "shapes do not fit",
    "E0208": "a block never assigns its first input",
    "E0209": "inputs are missing or too many",
    "E0210": "a measure of the model is not set",
    "E0211": "a statement does not belong in this body",
    "E0212": "a model's chain is wrong",
    "E0213": "a model is too large to write down",
    "E0214": "a definition contains itself",
    "E0216": "a template's parameters do not match",
    "E0217": "a name is given twice",
    "E0218": "something is never used",
    "E0219": "a tie does not hold",
    "E0220": "rotary positions need an even head size",
    "E0221": "the experts and the choice among them do not fit",
    # quantities and hardware
    "E0301": "units are mixed",
    "E0302": "a unit is missing or wrong",
    "E0303": "a number is out of range",
    "E0304": "a device is not known",
    "E0305": "a device's name is ambiguous",
    # plans
    "E0402": "a plan key cannot have this value",
    "E0403": "the tensor ranks cannot share the heads",
    "E0404": "the mesh does not fit the cluster",
    "E0405": "there are more pipeline ranks than blocks",
    "E0406": "the stages do not add up",
    "E0407": "two pins contradict each other",
    "E0408": "the mesh does not divide the batch",
    "E0409": "the budget is more than the device has",
    "E0410": "the context ranks cannot share the sequence",
    "E0411": "the context ranks cannot share the heads",
    "E0412": "no plan fits the memory budget",
    "E0413": "the expert ranks cannot share the experts",
    "E0414": "what is to live in host memory does not go with the rest of the plan",
    "E0415": "no plan keeps to the deadline, or to the cost",
    # train blocks and other sections
    "E0501": "a line does not belong in this section",
    "E0502": "a key is not known",
    "E0503": "a required key is missing",
    "E0504": "a choice is not known",
    "E0505": "a sequence is longer than the context",
    "E0506": "the batch is not a whole number of sequences",
    "E0507": "the length of the run is given twice",
    "E0508": "the device lacks the precision",
    "E0509": "the learning rate's phases do not fit the run",
    "E0510": "the parts of the precision do not go together",
    "E0511": "the batch's ramp does not work out",
    "E0512": "a goal lacks what it is judged by",
    # what is not built yet
    "E0601": "understood, but without meaning yet",
    "E0602": "a model is Python code, and not trusted",
    "E0603": "a model from PyTorch cannot be taken as it is",
    # the spec as a whole
    "E0701": "the spec trains nothing",
    "E0702": "which train block is meant is not clear",
    "E0703": "which plan is meant is not clear",
    # saved plans
    "E0801": "a file cannot be read as a plan",
    "E0802": "a saved plan is stale",
    "E0803": "the spec of a saved plan is not found",
    "E0804": "the action lists of a plan wait for each other",
}


def nearest_codes(code: str) -> tuple[str, ...]:
    """Helps for a code that does not exist."""
    wanted = code.strip().upper()
    return did_you_mean(wanted, CODES, otherwise="`docs/errors.md` lists them")


def explain(code: str) -> str | None:
    """The page of a code as markdown; None when there is no such code."""
    wanted = code.strip().upper()
    if wanted not in CODES:
        return None
    page = Path(__file__).parent / "pages" / f"{wanted}.md"
    return page.read_text(encoding="utf-8")
