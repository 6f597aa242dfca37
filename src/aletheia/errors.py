"""Every error Aletheia raises on purpose.

    AletheiaError
    ├── SettingsError   a setting that is out of range, unknown, or contradicts another
    ├── ModelError      a model that cannot be found, read or taken apart
    ├── DataError       rows that cannot be read or used; names file and line where it can
    ├── ProbeError      a probe that gave no usable scores (a non-finite gradient, no batch)
    ├── PlanError       a plan that cannot be made, or that belongs to another model
    ├── AdapterError    the adapted modules differ from the plan
    ├── TrainingError   a run that cannot continue (a non-finite loss)
    ├── EvaluationError an evaluation that cannot be run, resumed or compared
    ├── CacheError      a prefix cache that cannot be built, held or read
    ├── StatisticsError values that allow no estimate or test (none, a NaN, unequal counts)
    ├── SandboxError    model-written programs that cannot be contained on this machine
    ├── CampaignError   a campaign file that cannot be read, or a campaign that cannot continue
    ├── ArtifactError   an Aletheia file that cannot be read, or an output that would overwrite something
    └── Interrupted     a signal ended the run; carries the exit code

Each message says what was found, what was expected and the remedy, in one line. The command line prints it
after ``error:`` and exits with 2, or with the code of the signal after an interruption.
"""


class AletheiaError(Exception):
    """Base of all errors raised on purpose; the message is one line meant for the user."""


class SettingsError(AletheiaError):
    """A setting is out of range, unknown, or contradicts another; the message puts the names in backticks."""


class ModelError(AletheiaError):
    """The model cannot be found, read or taken apart into decoder layers."""


class DataError(AletheiaError):
    """Rows cannot be read or cannot be used for training."""


class ProbeError(AletheiaError):
    """The probe gave no usable scores."""


class PlanError(AletheiaError):
    """A plan cannot be made from these settings, or belongs to another model."""


class AdapterError(AletheiaError):
    """The adapted modules differ from the plan."""


class TrainingError(AletheiaError):
    """The run cannot continue."""


class EvaluationError(AletheiaError):
    """An evaluation cannot be run, resumed or compared with another."""


class CacheError(AletheiaError):
    """The prefix cache cannot be built, does not fit, or was damaged."""


class StatisticsError(AletheiaError):
    """The values given allow no estimate or test: none at all, not finite, or not paired."""


class SandboxError(AletheiaError):
    """Model-written programs cannot be contained on this machine."""


class CampaignError(AletheiaError):
    """The campaign file is not as expected, or the campaign cannot continue."""


class ArtifactError(AletheiaError):
    """An Aletheia file cannot be read, or an output would overwrite something."""


class Interrupted(AletheiaError):  # noqa: N818 - nothing went wrong
    """SIGTERM or Ctrl-C ended the run before it was done; ``exit_code`` is 128 plus the signal's number."""

    def __init__(self, message: str, signum: int) -> None:
        """``signum`` is the number of the signal received."""
        super().__init__(message)
        self.exit_code = 128 + signum
