"""Look at a trained network and at scans through it, on a page in the browser.

    python -m scripts.explore
    python -m scripts.explore --run_dir OUT --dataset_dir DIR
    python -m scripts.explore --ckpt D/model.pt --config_file "['configs/inference.json','configs/size_128.json']"

The page is served from this machine and for this machine; the address that is printed holds the token that opens it.
"""

from __future__ import annotations

import contextlib
import html
import logging
import os
import secrets
import socket
import tempfile
import webbrowser
from collections.abc import Sequence
from pathlib import Path

from scripts.utils.command_line import check_integer, run
from scripts.utils.errors import ResourceError

logger = logging.getLogger(__name__)

INFERENCE = str(Path(__file__).parents[1] / "configs" / "inference.json")


def explore(
    ckpt: str | os.PathLike | None = None,
    run_dir: str | os.PathLike | None = None,
    dataset_dir: str | os.PathLike | None = None,
    scan_pattern: str | Sequence[str] | None = None,
    prior: str | None = None,
    covariates_file: str | os.PathLike | None = None,
    error_rate: float | None = None,
    calibration: str | os.PathLike | None = None,
    draws: int | None = None,
    atlas: str | os.PathLike | None = None,
    config_file: str | Sequence[str] = INFERENCE,
    bundle_root: str | None = None,
    host: str = "127.0.0.1",
    port: int = 0,
    browser: bool = True,
) -> None:
    """Serve the page until Ctrl-C.

    Args:
        ckpt, run_dir, dataset_dir, scan_pattern, prior, covariates_file, error_rate, calibration, draws, atlas,
            bundle_root: keys of configs/inference.json; those that are not given stay as they are there. The
            calibration is a ``calibration.json``, of as many draws and the same atlas.
        config_file: configs/inference.json of this bundle, or that and overlays.
        host: the address to listen at. One that other machines reach is used with a warning.
        port: to listen at; 0 takes one that is free.
        browser: open the page in the browser.

    Raises:
        OSError: the address cannot be used.
        ValueError: an argument makes no sense, or the network, its weights or the scans cannot be used.
    """
    check_integer("port", port, 0, 65535)

    import uvicorn
    from monai.bundle import ConfigParser
    from scripts.webpage.app import create_app
    from scripts.webpage.guard import LOOPBACK
    from scripts.webpage.jobs import Jobs

    settings = {
        "ckpt": ckpt,
        "run_dir": run_dir,
        "dataset_dir": dataset_dir,
        "scan_pattern": scan_pattern,
        "prior": prior,
        "covariates_file": covariates_file,
        "error_rate": error_rate,
        "calibration": calibration,
        "draws": draws,
        "atlas": atlas,
        "bundle_root": bundle_root,
    }
    config = ConfigParser(ConfigParser.load_config_files(config_file))
    config.update({key: value for key, value in settings.items() if value is not None})
    jobs = Jobs(config)
    listener = _listen(host, port)
    token = secrets.token_urlsafe(24)
    shown = f"[{host}]" if ":" in host else host
    address = f"http://{shown}:{listener.getsockname()[1]}/?token={token}"
    if host not in LOOPBACK:
        logger.warning(
            "--host %s: other machines can reach this page, and whoever sees its address can see the scans; what is "
            "sent is not encrypted. An SSH tunnel to 127.0.0.1 is safer.",
            host,
        )
    logger.info("%d scan(s), weights '%s'. Open %s (Ctrl-C ends it)", len(jobs.cohort), jobs.name, address)
    app = create_app(jobs, token, LOOPBACK if host in LOOPBACK else ())
    door = _door(address) if browser else None
    server = uvicorn.Server(
        uvicorn.Config(app, log_level="warning", access_log=False, server_header=False, timeout_graceful_shutdown=3)
    )
    try:
        with contextlib.suppress(KeyboardInterrupt):  # the way to end it
            server.run(sockets=[listener])
    finally:
        if door is not None:
            door.unlink(missing_ok=True)


def _listen(host: str, port: int) -> socket.socket:
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise ResourceError(
            f"The page cannot be served at {host}, port {port} ({error.strerror}): set another --port."
        ) from None


def _door(address: str) -> Path:
    """Open an address in the browser by a file of this user's own: an address on a command line is seen by others."""
    descriptor, name = tempfile.mkstemp(suffix=".html", prefix="explore-")  # which only this user can read
    with os.fdopen(descriptor, "w") as file:
        file.write(f'<meta http-equiv="refresh" content="0;url={html.escape(address)}">')
    webbrowser.open(Path(name).as_uri())
    return Path(name)


if __name__ == "__main__":
    run("python -m scripts.explore", explore)
