"""The oracles by name. A new one is a config class with a `name`, a function that builds it, and a line here."""

from collections.abc import Callable
from typing import Annotated, Any

from pydantic import BaseModel, Field

from actors.environments.sequence import SequenceEnvironment
from actors.oracles.base import Oracle
from actors.oracles.callable import CallableOracle, CallableOracleConfig
from actors.oracles.motifs import MotifsConfig, MotifsOracle
from actors.oracles.table import CsvOracleConfig, NpyOracleConfig, csv_oracle, npy_oracle
from actors.oracles.tfbind8 import TFBind8Config, tfbind8_oracle

OracleConfig = Annotated[
    TFBind8Config | CsvOracleConfig | NpyOracleConfig | MotifsConfig | CallableOracleConfig,
    Field(discriminator="name"),
]

_BUILDERS: dict[type[BaseModel], Callable[[Any, SequenceEnvironment], Oracle]] = {
    TFBind8Config: tfbind8_oracle,
    CsvOracleConfig: csv_oracle,
    NpyOracleConfig: npy_oracle,
    MotifsConfig: MotifsOracle,
    CallableOracleConfig: CallableOracle,
}


def build_oracle(config: OracleConfig, environment: SequenceEnvironment) -> Oracle:
    """The oracle that `config` describes; raises OracleDataError if its data cannot be had or do not fit."""
    return _BUILDERS[type(config)](config, environment)
