"""The only file that names concrete parts: which store, which engine, which storage.

Also the entry of the processes that a server consists of: ``python -m rushes.wiring gateway | worker | slot``.
They get their settings from the supervisor through the environment (the command line shows in `ps`, and a
database address can hold a password).
"""

import asyncio
import contextlib
import fcntl
import importlib
import itertools
import os
import secrets
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TextIO

import msgspec

from rushes import log
from rushes.engines.base import Engine
from rushes.errors import NotFound, RushesError, SettingsError, StoreUnavailable
from rushes.queue.base import Store
from rushes.settings import Settings, remote_of

if TYPE_CHECKING:
    from rushes.engines.remote.base import RemoteEngine
    from rushes.engines.remote.configured import RemoteConfig
    from rushes.media.storage import Storage

CHILD_SETTINGS: Final = "RUSHES_CHILD_SETTINGS"
DATABASE: Final = "rushes.db"
START_SECONDS: Final = 30.0
DRAIN_SIGNAL: Final = signal.SIGUSR1
"""Tells a gateway to take no more submits, and to go on answering everything else."""
_STORAGE_MARK: Final = "storage/identity"
_places: Final[list[TextIO]] = []
"""Locks that are held for the life of the process."""
SLOT_COMMAND: Final = (sys.executable, "-m", "rushes.wiring", "slot")


# -- parts ----------------------------------------------------------------------------------------------


def make_store(settings: Settings) -> Store:
    """The store of these settings, not yet open."""
    if not settings.database_url:
        from rushes.queue.sqlite.store import SqliteStore

        return SqliteStore(settings.data_dir / DATABASE)
    if settings.database_url.startswith(("postgresql://", "postgres://")):
        from rushes.queue.postgres.store import PostgresStore

        return PostgresStore(settings.database_url, key_cache_seconds=settings.key_cache_seconds)
    raise SettingsError(
        "database_url must begin with postgresql:// (or be empty, for SQLite in the data directory)"
    )


@asynccontextmanager
async def opened_store(settings: Settings) -> AsyncIterator[Store]:
    store = make_store(settings)
    await store.open()
    try:
        yield store
    finally:
        await store.close()


async def identify_storage(settings: Settings, store: Store, storage: "Storage") -> None:
    """Make sure that a database and a storage belong together; they are paired on first use.

    Two servers on one database with a folder each would accept requests and lose their files. Raises
    SettingsError, StoreUnavailable.
    """
    place = settings.storage_url or str(settings.data_dir / "files")
    for last in (False, True):
        try:
            mark = bytes.fromhex(b"".join([part async for part in storage.stream(_STORAGE_MARK)]).decode())
        except NotFound:
            mark = os.urandom(32)
            await storage.put_bytes(_STORAGE_MARK, mark.hex().encode(), "text/plain")
            continue  # another process may have done the same: see whose it is now
        if await store.secret("storage", mark) == mark:
            return
        if last:
            break
    raise SettingsError(
        f"the files of this database are not in {place}: all servers and workers of a database need the same "
        "RUSHES_STORAGE_URL, or the same data directory"
    )


async def preflight(settings: Settings, seconds: float = START_SECONDS) -> None:
    """Look at everything that a server needs, before it says that it is there.

    Waits for a database that is still starting. Raises SettingsError, StoreUnavailable.
    """
    from rushes.engines.remote.configured import configured
    from rushes.media.storage import open_storage

    configured(settings, os.environ)
    deadline = time.monotonic() + seconds
    while True:
        try:
            async with opened_store(settings) as store:
                await identify_storage(settings, store, open_storage(settings))
        except StoreUnavailable as error:
            if time.monotonic() > deadline:
                raise
            log.event("waiting", error=error.message)
            await asyncio.sleep(1.0)
        else:
            return


def make_engine(settings: Settings, slot: int = 0, tell: Callable[[str], None] = lambda _: None) -> Engine:
    """The engine of the local slot with this number, from 0. Raises SettingsError where the name says nothing.

    ``tell`` hears, where that takes long, how it gets on.
    """
    if settings.engine == "comfyui":
        return _comfyui(settings, slot)
    if settings.engine == "wan":
        return _wan(settings, slot, tell)
    if settings.engine == "draft":
        from rushes.engines.draft.engine import DraftEngine

        return DraftEngine(mark=settings.draft_mark)
    if settings.engine == "noop":
        from rushes.engines.noop import NoopEngine

        return NoopEngine()
    module, colon, factory = settings.engine.partition(":")
    if not colon:
        raise SettingsError(
            f"engine cannot be {settings.engine!r}: there is `draft`, `comfyui`, `wan`, or `module:factory`"
        )
    try:
        made: Engine = getattr(importlib.import_module(module), factory)()
    except (ImportError, AttributeError) as error:
        raise SettingsError(f"engine {settings.engine!r} cannot be loaded: {error}") from error
    return made


def _comfyui(settings: Settings, slot: int) -> Engine:
    from rushes.engines.comfyui.engine import ComfyUIEngine
    from rushes.engines.comfyui.process import ComfyProcess

    folder, identity = _comfyui_place(settings, slot)
    process = None
    if settings.comfyui_dir is not None:
        process = ComfyProcess.start(
            settings.comfyui_dir,
            python=settings.comfyui_python,
            arguments=settings.comfyui_args,
            work=folder,
            number=slot,
            seconds=settings.engine_start_seconds,
        )
        url = process.url
    elif slot < len(settings.comfyui_urls):
        url = settings.comfyui_urls[slot]
    else:
        raise SettingsError(
            "engine comfyui needs RUSHES_COMFYUI_DIR, or RUSHES_COMFYUI_URLS with a server for each slot"
        )
    return ComfyUIEngine(
        url,
        identity=identity,
        variants=settings.comfyui_variants,
        process=process,
        start_seconds=settings.engine_start_seconds,
    )


def _comfyui_place(settings: Settings, slot: int) -> tuple[Path, str]:
    """A folder of this slot's own, and the name by which it knows its left-overs in a ComfyUI's queue.

    The same again after a restart, and nobody else's while this process lives: a server and a worker may share a
    data directory.
    """
    for place in itertools.count():
        folder = settings.data_dir.resolve() / "comfyui" / str(place)
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        file = (folder / f"slot-{slot}.identity").open("a+", encoding="ascii")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            continue
        file.seek(0)
        identity = file.read().strip()
        if not identity:
            identity = secrets.token_hex(16)
            file.write(identity)
            file.flush()
        _places.append(file)
        return folder, identity
    raise AssertionError


def _wan(settings: Settings, slot: int, tell: Callable[[str], None]) -> Engine:
    from rushes.catalog.load import Catalog
    from rushes.engines.wan import devices
    from rushes.engines.wan.weights import wanted_weights

    device = devices.choose(settings.wan_device, slot, os.environ, settings.wan_cards)  # before CUDA looks
    devices.keep_compiled(settings.data_dir.resolve() / "wan" / "compiled", os.environ)
    try:
        from rushes.engines.wan.engine import WanEngine
    except ModuleNotFoundError as error:
        text = f"engine wan needs more packages ({error.name} is missing): pip install 'rushes[wan]'"
        raise SettingsError(text) from None
    served = wanted_weights(settings, Catalog.load(settings.models_dir), tell)
    return WanEngine(
        served.local,
        profile=settings.wan_profile,
        device=device,
        loras_dir=settings.wan_loras_dir,
        models=served.models,
        cards=settings.wan_cards,
    )


def make_remotes(settings: Settings, environ: Mapping[str, str]) -> "list[RemoteEngine]":
    """The remotes that the settings name. Raises SettingsError where one cannot be used as it is written."""
    from rushes.engines.remote.configured import configured

    found = configured(settings, environ)
    if not found:
        return []
    from rushes.engines.remote.dashscope import DashScopeEngine
    from rushes.engines.remote.fal import FalEngine
    from rushes.engines.remote.openai_video import OpenAIVideoEngine
    from rushes.engines.remote.replicate import ReplicateEngine
    from rushes.engines.remote.runcomfy import RunComfyEngine

    kinds: dict[str, Callable[[RemoteConfig], RemoteEngine]] = {
        "dashscope": DashScopeEngine,
        "runcomfy": RunComfyEngine,
        "openai-video": OpenAIVideoEngine,
        "fal": FalEngine,
        "replicate": ReplicateEngine,
    }
    return [kinds[config.kind](config) for config in found]


def comfyui_object_info(url: str) -> dict[str, Any]:
    """What the ComfyUI at ``url`` knows of its nodes. Raises RushesError where it cannot be asked."""
    from rushes.engines.comfyui.catalogue import fetch_object_info

    return fetch_object_info(url)


# -- the gateway's process ------------------------------------------------------------------------------


async def run_gateway(settings: Settings, listener: socket.socket) -> None:
    """Serve until SIGTERM; then answer what is in flight and return."""
    import uvicorn

    from rushes.api.app import make_app
    from rushes.api.protocol import serving_protocol
    from rushes.catalog.load import Catalog
    from rushes.media.fetch import policy_from
    from rushes.media.inspector import Inspector
    from rushes.media.scratch import scratch_folder
    from rushes.media.storage import open_storage
    from rushes.service.core import Service

    async with contextlib.AsyncExitStack() as stack:
        store = await stack.enter_async_context(opened_store(settings))
        storage = open_storage(settings)
        inspector = Inspector(max_pixels=settings.max_image_pixels)
        stack.push_async_callback(inspector.close)
        scratch = stack.enter_context(scratch_folder(settings))
        catalog = Catalog.load(settings.models_dir)
        for problem in catalog.broken:
            log.event("model not usable", error=problem.message)
        service = Service(
            settings,
            store=store,
            storage=storage,
            catalog=catalog,
            policy=policy_from(settings),
            secret=await store.secret("links"),
        )
        app = make_app(
            settings, service=service, store=store, storage=storage, inspector=inspector, scratch=scratch
        )
        following = asyncio.create_task(service.follow_catalog())
        stack.callback(following.cancel)
        await _welcome(settings, store, listener)

        class Server(uvicorn.Server):
            """uvicorn, leaving signals to us."""

            @contextlib.contextmanager
            def capture_signals(self) -> Iterator[None]:
                yield

        server = Server(
            uvicorn.Config(
                app,
                loop="none",
                http=serving_protocol(),
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=True,
                forwarded_allow_ips=settings.trusted_proxies,
                backlog=2048,
                timeout_keep_alive=75,
                timeout_graceful_shutdown=10,
            )
        )
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(DRAIN_SIGNAL, service.drain)
        loop.add_signal_handler(signal.SIGTERM, lambda: setattr(server, "should_exit", True))
        # The switch between the loop and the store's writer thread should not wait for the default 5 ms.
        sys.setswitchinterval(0.0005)
        await server.serve(sockets=[listener])


async def _welcome(settings: Settings, store: Store, listener: socket.socket) -> None:
    """Say where we listen; on the very first start make a key and show it, once."""
    from rushes.service.keys import new_key

    host, port = listener.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    lines = [f"Rushes listens on http://{shown}:{port}"]
    if settings.workers:
        lines.append(f"Engine of the {settings.workers} local slot(s): {settings.engine}")
    if settings.engine == "comfyui" and settings.workers:
        from rushes.engines.comfyui.catalogue import without_password

        lines += [f"  {without_password(url)}" for url in settings.comfyui_urls]
        if settings.comfyui_dir is not None:
            lines.append(f"  started from {settings.comfyui_dir}")
    if settings.remotes:
        names = ", ".join(remote_of(text).name for text in settings.remotes)
        lines.append(f"Remote engines: {names} (`rushes models route ID` says what goes there)")
    if settings.engine == "draft" and settings.workers:
        lines.append("  It makes animatics on the CPU to build and test against, not generations.")
    if not await store.list_keys():
        key, record = new_key("first")
        await store.add_key(record)
        lines.append(f"Your API key, shown this once: {key}")
    print("\n".join(lines), flush=True)


# -- the worker's process -------------------------------------------------------------------------------


async def run_worker(settings: Settings, owner: str = "") -> None:
    """Work until SIGTERM or SIGINT, then drain; a second signal ends at once.

    With an ``owner`` (the supervising server's id), workers of that owner that are still on the list are dead:
    a server runs one worker process, so their leases are ended now instead of after the lease time.
    """
    from rushes.catalog.load import Catalog
    from rushes.engines.remote.configured import hidden_from_slots
    from rushes.media.inspector import Inspector
    from rushes.media.scratch import scratch_folder
    from rushes.media.storage import open_storage
    from rushes.worker.lease import worker_lost
    from rushes.worker.loop import Worker

    stop = asyncio.Event()
    loop = asyncio.get_running_loop()

    def on_signal() -> None:
        if stop.is_set():
            os._exit(130)
        stop.set()

    loop.add_signal_handler(signal.SIGTERM, on_signal)
    if not owner:
        loop.add_signal_handler(signal.SIGINT, on_signal)
    async with contextlib.AsyncExitStack() as stack:
        if not owner:  # a server has looked already
            await preflight(settings)
        store = await stack.enter_async_context(opened_store(settings))
        if owner:
            for worker in await store.workers():
                if worker.owner == owner:
                    await store.bury(worker.id, worker_lost(), settings.attempt_limit)
        inspector = Inspector(max_pixels=settings.max_image_pixels)
        stack.push_async_callback(inspector.close)
        os.environ[CHILD_SETTINGS] = encode_settings(settings)
        remotes = make_remotes(settings, os.environ)
        for name in hidden_from_slots(os.environ):
            # Engines run people's code, such as custom nodes, which has no business with them.
            os.environ.pop(name, None)
        worker_loop = Worker(
            settings,
            store=store,
            storage=open_storage(settings),
            catalog=Catalog.load(settings.models_dir),
            inspector=inspector,
            scratch=stack.enter_context(scratch_folder(settings)),
            slot_command=SLOT_COMMAND,
            remotes=remotes,
            owner=owner,
        )
        await worker_loop.run(stop)


# -- processes ------------------------------------------------------------------------------------------


def encode_settings(settings: Settings) -> str:
    return msgspec.json.encode(settings, enc_hook=str).decode()


def decode_settings(text: str) -> Settings:
    return msgspec.json.decode(text, type=Settings, dec_hook=lambda type_, value: type_(value))


def main(arguments: list[str]) -> None:
    """Be one of a server's processes."""
    log.configure()
    settings = decode_settings(os.environ[CHILD_SETTINGS])
    try:
        _be(arguments, settings)
    except RushesError as error:
        log.event("ended", role=arguments[0], error=error.message)
        raise SystemExit(1) from None


def _be(arguments: list[str], settings: Settings) -> None:
    from rushes.guard import die_with_parent
    from rushes.worker.child import main as run_slot

    match arguments:
        case ["slot", number]:
            run_slot(lambda tell: make_engine(settings, int(number), tell))
        case ["gateway", descriptor]:
            die_with_parent()
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            import uvloop

            uvloop.run(run_gateway(settings, socket.socket(fileno=int(descriptor))))
        case ["worker", owner]:
            die_with_parent()
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            import uvloop

            uvloop.run(run_worker(settings, owner))
        case _:
            raise SystemExit(
                f"usage: python -m rushes.wiring gateway FD | worker OWNER | slot NUMBER; got {arguments}"
            )


if __name__ == "__main__":
    main(sys.argv[1:])
