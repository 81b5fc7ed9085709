"""What every engine of a remote is before its wire: a name, a key, a connection, and the tables of its kind."""

from typing import ClassVar

from rushes.catalog.model import Model
from rushes.catalog.remotes import RemoteTable, remote_table
from rushes.engines.remote.base import RemoteUnavailable
from rushes.engines.remote.configured import RemoteConfig
from rushes.engines.remote.http import RemoteHTTP


class KeyedEngine:
    """Half of a :class:`rushes.engines.remote.base.RemoteEngine`. ``seconds`` bound each call."""

    kind: str
    poll_seconds: float
    key_scheme: ClassVar[str] = "Bearer"
    """The word before the key in ``Authorization``."""

    def __init__(self, config: RemoteConfig, *, seconds: float = 60.0) -> None:
        headers = {"Authorization": f"{self.key_scheme} {config.key.value}"} if config.key else {}
        self.name = config.name
        self._http = RemoteHTTP(config.name, self._base_url(config), headers, seconds)
        self.origin = self._http.origin

    def _base_url(self, config: RemoteConfig) -> str:
        return config.base_url

    def serves(self, model: Model) -> bool:
        return remote_table(model, self.kind) is not None

    def headers(self) -> dict[str, str]:
        return dict(self._http.headers)

    async def close(self) -> None:
        await self._http.close()

    def _table(self, model: Model) -> RemoteTable:
        """How the model runs there. Raises RemoteUnavailable where its manifest does not say, or says no more."""
        table = remote_table(model, self.kind)
        if table is None:
            raise RemoteUnavailable("model", f"the manifest of {model.id} does not say how {self.kind} runs it")
        return table
