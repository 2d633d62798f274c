"""The ``backend`` option of a layer."""

from __future__ import annotations

from throughtime.backends.backend import BackendName, Request, can_run
from throughtime.backends.selection import check_name


class BackendChoice:
    """Gives a layer the attribute ``backend``, checked whenever it is set."""

    def backend_request(self) -> Request:
        """What the layer will ask a backend for, from its own sizes, device and dtype."""
        raise NotImplementedError

    @property
    def backend(self) -> BackendName:
        """The backend asked for; anything but ``"auto"`` runs or raises."""
        return self._backend

    @backend.setter
    def backend(self, name: BackendName) -> None:
        check_name(name)
        if name != "auto":
            # The layer may move to another device and dtype yet: what can never run is refused.
            reason = can_run(name, self.backend_request()._replace(device=None, dtype=None))
            if reason is not None:
                raise RuntimeError(
                    f"backend={name!r} cannot run this {type(self).__name__}: {reason}"
                )
        self._backend: BackendName = name
