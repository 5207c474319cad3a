"""The nouns of a diagnosis: one check a row, with the command that mends what is wrong."""

from typing import Literal

from pydantic import BaseModel, ConfigDict

CheckStatus = Literal["ok", "note", "wrong"]
_Part = Literal["machine", "packages", "hub", "model"]


class DoctorCheck(BaseModel):
    """One thing that was looked at. `fix` is a command, or else what to do; a note's fix is an offer."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    part: _Part
    name: str
    value: str
    status: CheckStatus = "ok"
    fix: str | None = None


class Diagnosis(BaseModel):
    """All of `qeval doctor --json`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    doctor_version: Literal[1] = 1
    ok: bool
    checks: list[DoctorCheck]

    @property
    def exit_code(self) -> int:
        """0 where nothing is wrong, else 1."""
        return 0 if self.ok else 1
