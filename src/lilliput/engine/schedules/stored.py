"""The schedule an artifact keeps, and follows by default."""

import logging

from lilliput.artifact.read import Artifact
from lilliput.artifact.schema import schedule_misfit
from lilliput.core.errors import ConfigError, LilliputError, UnknownName
from lilliput.engine.schedules import SCHEDULES
from lilliput.engine.schedules.base import Schedule

log = logging.getLogger("lilliput.engine")


def stored_schedule(artifact: Artifact) -> Schedule | None:
    """Return the schedule in the artifact's manifest, None where there is none.

    A copy without the widths it needs does without, and the log says so.
    Raises ConfigError for one that was learned from another model or for another horizon, or whose options make no
    sense; UnknownName for one nobody registered; InputCorrupt for a damaged file.
    """
    entry, where = artifact.manifest.schedule, f"{artifact.path}: schedule"
    if entry is None:
        return None
    absent = {entry.prefill_bits, *entry.ladder} - set(artifact.bits)
    if absent:
        log.warning("%s: this copy lacks %d bits, so its schedule is left out", artifact.path, max(absent))
        return None
    tensors, said = artifact.schedule_tensors()
    misfit = schedule_misfit(artifact.manifest, said)
    if misfit is not None:
        raise ConfigError(misfit, where, "Learn it anew with `lilliput schedule`, or give --bits or --schedule")
    try:
        made: Schedule = SCHEDULES.load(entry.name).stored(entry, tensors)
    except UnknownName as error:
        raise UnknownName(error.what, where, "Update lilliput, or give --bits or --schedule") from None
    except LilliputError:
        raise
    except (TypeError, ValueError, KeyError) as error:
        what = f"{entry.name} cannot be made of what is stored ({error})"
        raise ConfigError(what, where, "Set it anew with `lilliput schedule`, or give --bits or --schedule") from None
    return made.fitted(artifact.bits)
