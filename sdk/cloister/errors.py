"""Every error that Cloister raises on purpose.

    CloisterError
    ├── SettingError                a value outside its documented bound
    ├── CheckpointError             a checkpoint directory that cannot be read or written
    │   ├── UnsupportedArchitecture     no decoder layout of that name
    │   ├── UnsupportedFeature          a known layout with a switch that is not implemented
    │   ├── TensorMismatch              a tensor missing, unexpected, or of another shape
    │   └── NonFiniteTensor             a tensor with NaN or infinity
    ├── QuantizationError           a layer that the recipe cannot quantize
    │   └── GroupSizeError              the group size does not divide the layer's inputs
    ├── ExportError                 a program that cannot be built
    │   ├── ExportMismatch              the program does not compute what the model computes
    │   └── GateFailed                  a bundle worse than the bounds it was given
    ├── EmbedError                  a bundle that ExecuTorch's stock runners cannot run
    ├── BundleError                 a bundle directory that cannot be used
    │   ├── ManifestInvalid             the manifest is not what the format says
    │   ├── BundleVersionError          a format version this release does not know
    │   ├── BundleCorrupt               a file missing, unexpected, truncated or altered
    │   └── IncompatibleProgram         no program in the bundle runs on this machine
    ├── TokenizerError              a tokenizer that cannot be read
    │   └── VocabularyMismatch          the tokenizer and the model disagree on the vocabulary
    ├── PromptError                 text that cannot be given to a model
    │   ├── EmptyPrompt
    │   ├── InvalidText                 bytes that are not UTF-8
    │   ├── ContextExceeded             more tokens than the context holds
    │   ├── MediaTooLarge               a picture or recording with too many pixels or samples
    │   ├── MediaUnreadable             what is no picture or recording of a known format
    │   └── UnsupportedMedia            a picture or recording for a model that does not take it
    ├── ConstraintError             a schema, grammar or list of choices that cannot be followed
    │   └── AnswerIncomplete            an answer cut off before it met its constraint
    ├── ResourceError               the machine has too little of something
    │   ├── NotEnoughMemory
    │   └── NotEnoughDisk
    ├── OutputExists                the place to write to is taken
    ├── OutputUnwritable            the place to write to cannot be written
    ├── RedactionFailed             a file that would hold what was to be replaced in it
    ├── EngineBusy                  an engine asked from two threads, or by two unfinished streams
    ├── ReplayError                 a replay file that is malformed or gives other tokens
    ├── SnapshotError               KV state that is malformed or belongs to another model
    ├── DataError                   a data set that cannot be used
    │   └── OverlapError                evaluation data among the training data
    ├── TrainingError               a training run that cannot go on
    │   └── LossNotFinite               a loss or gradient that is NaN or infinite
    ├── VaultError                  a vault that cannot be used
    │   ├── WrongPassphrase             the passphrase is not the vault's
    │   ├── KeyMissing                  the key store or key file does not hold the vault's key
    │   ├── KeyDamaged                  a record of keys is not what was written
    │   ├── SessionMismatch             a conversation with another model or system prompt
    │   ├── VaultDamaged                content is not what was written, or not where it was
    │   ├── VaultRolledBack             an older state than the one that was last closed
    │   ├── VaultUnsafe                 others could read or replace it, or it lies on a network
    │   └── VaultVersionError           written by a release with another format
    ├── KernelsUnavailable          Cloister's own operators cannot be built or loaded here
    ├── GuardError                  the network cannot be refused on this system
    └── WorkerError                 the worker process ended or broke its protocol
        └── ProtocolError               a message that is malformed, oversized or of another version

A message says what happened, to which object, and what to do now, in one sentence, and never
holds text that a user typed or that a model answered.
"""

import traceback
from pathlib import Path

__all__ = [
    "AnswerIncomplete",
    "BundleCorrupt",
    "BundleError",
    "BundleVersionError",
    "CheckpointError",
    "CloisterError",
    "ConstraintError",
    "ContextExceeded",
    "DataError",
    "EmbedError",
    "EmptyPrompt",
    "EngineBusy",
    "ExportError",
    "ExportMismatch",
    "GateFailed",
    "GroupSizeError",
    "GuardError",
    "IncompatibleProgram",
    "InvalidText",
    "KernelsUnavailable",
    "KeyDamaged",
    "KeyMissing",
    "LossNotFinite",
    "ManifestInvalid",
    "MediaTooLarge",
    "MediaUnreadable",
    "NonFiniteTensor",
    "NotEnoughDisk",
    "NotEnoughMemory",
    "OutputExists",
    "OutputUnwritable",
    "OverlapError",
    "PromptError",
    "ProtocolError",
    "QuantizationError",
    "RedactionFailed",
    "ReplayError",
    "ResourceError",
    "SessionMismatch",
    "SettingError",
    "SnapshotError",
    "TensorMismatch",
    "TokenizerError",
    "TrainingError",
    "UnsupportedArchitecture",
    "UnsupportedFeature",
    "UnsupportedMedia",
    "VaultDamaged",
    "VaultError",
    "VaultRolledBack",
    "VaultUnsafe",
    "VaultVersionError",
    "VocabularyMismatch",
    "WorkerError",
    "WrongPassphrase",
    "place_of",
]


def place_of(error: BaseException) -> str:
    """Say an error by its type and place alone: its words may quote what a user typed."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__} at {Path(frame.filename).name}, line {frame.lineno}"


class CloisterError(Exception):
    """Base of every error raised on purpose; the command line prints its message and exits 1."""


class SettingError(CloisterError, ValueError):
    """A value outside its documented bound."""


class CheckpointError(CloisterError):
    """A checkpoint directory that cannot be read or written."""


class UnsupportedArchitecture(CheckpointError):
    """No decoder layout of that name."""


class UnsupportedFeature(CheckpointError):
    """A known layout with a switch that is not implemented."""


class TensorMismatch(CheckpointError):
    """A tensor missing, unexpected, or of another shape."""


class NonFiniteTensor(CheckpointError):
    """A tensor with NaN or infinity."""


class QuantizationError(CloisterError):
    """A layer that the recipe cannot quantize."""


class GroupSizeError(QuantizationError):
    """The group size does not divide the layer's inputs."""


class ExportError(CloisterError):
    """A program that cannot be built."""


class EmbedError(CloisterError):
    """A bundle that ExecuTorch's stock runners cannot run."""


class ExportMismatch(ExportError):
    """The program does not compute what the model computes."""


class GateFailed(ExportError):
    """A bundle worse than the bounds it was given."""


class BundleError(CloisterError):
    """A bundle directory that cannot be used."""


class ManifestInvalid(BundleError):
    """The manifest is not what the format says."""


class BundleVersionError(BundleError):
    """A format version this release does not know."""


class BundleCorrupt(BundleError):
    """A file missing, unexpected, truncated or altered."""


class IncompatibleProgram(BundleError):
    """No program in the bundle runs on this machine."""


class TokenizerError(CloisterError):
    """A tokenizer that cannot be read."""


class VocabularyMismatch(TokenizerError):
    """The tokenizer and the model disagree on the vocabulary."""


class PromptError(CloisterError):
    """Text that cannot be given to a model."""


class EmptyPrompt(PromptError):
    """A prompt without any character."""


class InvalidText(PromptError):
    """Bytes that are not UTF-8."""


class ContextExceeded(PromptError):
    """More tokens than the context holds."""


class MediaTooLarge(PromptError):
    """A picture or recording with too many pixels or samples."""


class MediaUnreadable(PromptError):
    """What is no picture or recording of a known format."""


class UnsupportedMedia(PromptError):
    """A picture or recording for a model that does not take it."""


class ConstraintError(CloisterError):
    """A schema, grammar or list of choices that cannot be followed."""


class AnswerIncomplete(ConstraintError):
    """An answer cut off before it met its constraint."""


class ResourceError(CloisterError):
    """The machine has too little of something."""


class NotEnoughMemory(ResourceError):
    """Loading or running would need more memory than is available."""


class NotEnoughDisk(ResourceError):
    """Writing would need more disk than is free."""


class OutputExists(CloisterError):
    """The place to write to is taken."""


class OutputUnwritable(CloisterError):
    """The place to write to cannot be written."""


class RedactionFailed(CloisterError):
    """A file that would hold what was to be replaced in it."""


class EngineBusy(CloisterError):
    """An engine asked from two threads, or by two unfinished streams."""


class ReplayError(CloisterError):
    """A replay file that is malformed or gives other tokens."""


class SnapshotError(CloisterError):
    """KV state that is malformed or belongs to another model."""


class DataError(CloisterError):
    """A data set that cannot be used."""


class OverlapError(DataError):
    """Evaluation data among the training data."""


class TrainingError(CloisterError):
    """A training run that cannot go on."""


class LossNotFinite(TrainingError):
    """A loss or gradient that is NaN or infinite."""


class VaultError(CloisterError):
    """A vault that cannot be used."""


class WrongPassphrase(VaultError):
    """The passphrase is not the vault's."""


class KeyMissing(VaultError):
    """The key store or key file does not hold the vault's key."""


class KeyDamaged(VaultError):
    """A record of keys is not what was written."""


class SessionMismatch(VaultError):
    """A conversation with another model or system prompt."""


class VaultDamaged(VaultError):
    """Content is not what was written, or not where it was."""


class VaultRolledBack(VaultError):
    """An older state than the one that was last closed."""


class VaultUnsafe(VaultError):
    """Others could read or replace the vault, or it lies on a network."""


class VaultVersionError(VaultError):
    """Written by a release with another format."""


class KernelsUnavailable(CloisterError):
    """Cloister's own operators cannot be built or loaded here."""


class GuardError(CloisterError):
    """The network cannot be refused on this system."""


class WorkerError(CloisterError):
    """The worker process ended or broke its protocol."""


class ProtocolError(WorkerError):
    """A message that is malformed, oversized or of another version."""


def named(error: Exception, what: str) -> CloisterError:
    """Return an error of ours as it is; for another one that says where `what` failed, not how."""
    if isinstance(error, CloisterError):
        return error
    return WorkerError(f"{what} failed unexpectedly ({place_of(error)}); report it.")
