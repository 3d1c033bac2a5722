"""What every result on disk is made of."""

from pydantic import BaseModel, ConfigDict


class Frozen(BaseModel):
    """Immutable, no unknown fields, no NaN or infinity."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())
