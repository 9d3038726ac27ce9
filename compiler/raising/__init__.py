"""Models from PyTorch: a module is built without memory, traced, and raised into the dialect."""

from llmspec.compiler.raising.check import Raised, check_raised, from_module
from llmspec.compiler.raising.load import load_module
from llmspec.compiler.raising.model import raise_model
from llmspec.compiler.raising.recording import record

__all__ = ["Raised", "check_raised", "from_module", "load_module", "raise_model", "record"]
