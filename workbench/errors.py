"""Named errors: what was asked, what was found, and what to do. Their text is part of the interface and is tested."""


class WorkbenchError(ValueError):
    """Base of every error that a user can cause and mend; the command line prints it as one line and exits with 2."""


class UnknownOption(WorkbenchError):
    """An option that is none of the values it can take."""


class UnknownModel(WorkbenchError):
    """No model of this name is embedded, cached, on disk, or reachable."""


class BrokenModel(WorkbenchError):
    """A model's files are there but cannot be used: missing, truncated, altered or pickled weights."""


class UnknownArchitecture(WorkbenchError):
    """The model's family has no row in `workbench.architectures`, and none could be guessed that passes the self-check."""


class UnknownSite(WorkbenchError):
    """No such site exists, or this model's family does not have it."""


class ReadOnlySite(WorkbenchError):
    """A site that can be read, but where writing would not reach the model."""


class MissingWeight(WorkbenchError):
    """The model's family has no such weight matrix."""


class NotExact(WorkbenchError):
    """A change of activations that no change of the weights equals."""


class UnreadableWeight(MissingWeight):
    """The weight exists, but is quantised, not loaded, or not all that its module multiplies by."""


class LayerOutOfRange(WorkbenchError):
    """A layer index or range that the model does not have."""


class UnknownToken(WorkbenchError):
    """A text that is no token of the vocabulary, or a token id outside it."""


class TextTooLong(WorkbenchError):
    """A text of more tokens than the model's context."""


class BadCorpus(WorkbenchError):
    """A corpus that does not exist, cannot be read as text, or holds none."""


class TooFewTokens(WorkbenchError):
    """Fewer tokens, or fewer documents, than what was asked for can be worked out from."""


class TooFewFacts(WorkbenchError):
    """Fewer facts that the model knows than what was asked for can be worked out from."""


class BadDataset(WorkbenchError):
    """Labelled examples that cannot be read, or do not fit together: a column that is not there, a span outside its text."""


class TooFewExamples(WorkbenchError):
    """One class alone, a class in fewer groups than can be held out, or fewer rows than what was asked for needs."""


class OutOfMemory(WorkbenchError):
    """Memory ran out, and there is nothing left to make smaller."""


class LengthMismatch(WorkbenchError):
    """Texts of different numbers of tokens, or batches of different size, where one's positions must be the other's."""


class UnknownNorm(WorkbenchError):
    """A norm that is neither a LayerNorm nor an RMS norm, so that it cannot be frozen to a linear map."""


class NoGradient(WorkbenchError):
    """No derivative can be taken of what was asked for."""


class MissingPackage(WorkbenchError):
    """What was asked for needs a package that is not installed."""


class RemoteUnavailable(WorkbenchError):
    """NDIF cannot be reached, or does not run the model for this user now."""


class NotFinite(WorkbenchError):
    """NaN or infinity where a number is needed."""


class VerificationFailed(WorkbenchError):
    """The model does not obey the identities that its family's row promises, so nothing read from it can be trusted."""


class PullFailed(WorkbenchError):
    """The embedded model could not be fetched or converted."""


class CannotWrite(WorkbenchError):
    """An output folder or file cannot be written."""


class FolderInUse(WorkbenchError):
    """Another job is writing to the folder."""


class OtherJob(WorkbenchError):
    """The folder holds what a job of other settings, another model or another corpus wrote."""


class NotComparable(WorkbenchError):
    """Two results that cannot be held against each other: of other neurons, tokens, or ways of making them."""


class UnknownRun(WorkbenchError):
    """No run that was recorded has this id, or several do."""


class NotReproduced(WorkbenchError):
    """A run that was made again gave something else than it did before, or was made of something else."""


class BadArtifact(WorkbenchError):
    """A saved result is missing, incomplete, or of another kind than the one asked for."""


def require_one_of(option: str, value: object, allowed: tuple[object, ...]) -> None:
    """
    Raises:
        UnknownOption: if the value is none of those allowed.
    """
    if value not in allowed:
        raise UnknownOption(f"{option}={value!r} is not known. Use one of {', '.join(map(repr, allowed))}.")
