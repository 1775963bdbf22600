"""Every error fxopt raises on purpose.

A message says what was asked, what was found, and what to do. Whoever calls fxopt needs to
catch only `FxoptError`; the children say which stage refused.
"""


class FxoptError(Exception):
    """Base of all errors that fxopt raises on purpose."""


class CaptureError(FxoptError):
    """The model could not be turned into a graph, or the graph differs from the model."""


class InputError(FxoptError):
    """Inputs do not fit the captured signature, or none could be made."""


class ModelError(FxoptError):
    """The model itself cannot be optimized: NaN weights, no parameters, a meta device."""


class IllegalGraphError(FxoptError):
    """A graph holds what its level does not allow, or its recorded shapes are wrong."""


class AnalysisError(FxoptError):
    """A question about a program cannot be answered, or a rule table contradicts itself."""


class RecipeError(FxoptError):
    """A recipe has an unknown key, a wrong value, or passes in an order that cannot work."""


class CalibrationError(FxoptError):
    """Calibration data is missing, empty, or not finite."""


class PassError(FxoptError):
    """A pass failed; the program is as it was before the pass."""


class ExpectationError(PassError):
    """A pass did not do what the recipe's `expect` demands."""


class VerificationError(PassError):
    """A rewrite did not keep its promise; the program is as it was before the pass."""


class NotEquivalentError(VerificationError):
    """A pass that promised equivalence changed the function."""


class QualityFloorError(VerificationError):
    """A lossy pass cost more than the recipe's floor allows."""


class LoweringError(FxoptError):
    """A graph could not be lowered to the asked target."""


class KernelError(FxoptError):
    """A kernel was called with something it cannot compute."""


class SaveError(FxoptError):
    """An optimized model could not be written."""


class StateDictError(SaveError):
    """A program computes what no weights of the original model can express."""


class LoadError(FxoptError):
    """A saved folder is damaged, foreign, newer than this fxopt, or unsafe."""
