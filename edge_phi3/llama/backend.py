"""llama.cpp's backends and its log."""

import collections
import ctypes
import logging
import signal
import threading

import llama_cpp

logger = logging.getLogger(__package__)
logger.addHandler(logging.NullHandler())  # without a log of the program's own, nothing is printed

_ERROR_LEVEL = 4
_AGAIN = 0.05
"""Seconds."""
_errors: collections.deque[str] = collections.deque(maxlen=4)
_SAYS_NOTHING = "failed to load model"
"""How the last of several complaints about a model ends; the one before it tells why."""

_EXPECTED_WARNINGS = (
    "Phi SWA is currently disabled",  # the engine keeps the window itself
    "control-looking token",  # </s> is an ordinary token in Phi-3's tokenizer_config.json
    "special_eom_id is not in special_eog_ids",  # the engine knows the model's end tokens
)
_LOG_LEVELS = {2: logging.DEBUG, 3: logging.WARNING, 4: logging.ERROR}


def _log_to_python(level: int, text: bytes, _user_data: object) -> None:
    """Pass llama.cpp's own lines to the log of this module, its chatter as debug."""
    try:
        line = text.decode(errors="replace").strip()
        if level >= _ERROR_LEVEL:
            _errors.append(line)
        if line.strip("."):
            expected = any(part in line for part in _EXPECTED_WARNINGS)
            logger.log(logging.DEBUG if expected else _LOG_LEVELS.get(level, logging.DEBUG), "%s", line)
    except (KeyboardInterrupt, SystemExit) as error:
        # It would be lost in llama.cpp. The signal comes once more, when Python is back.
        again = signal.SIGINT if isinstance(error, KeyboardInterrupt) else signal.SIGTERM
        threading.Timer(_AGAIN, signal.pthread_kill, [threading.main_thread().ident, again]).start()


_LOG_CALLBACK = llama_cpp.llama_log_callback(_log_to_python)


def reason() -> str:
    """Return llama.cpp's own last complaint that tells something, as the end of a sentence."""
    told = [line for line in _errors if not line.endswith(_SAYS_NOTHING)]
    _errors.clear()
    return f" ({told[-1]})" if told else ""


def initialise_backend() -> None:
    """Start llama.cpp's backends, unless they are started, and take over its log from whoever had it."""
    llama_cpp.llama_log_set(_LOG_CALLBACK, ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()


def supports_gpu_offload() -> bool:
    """Whether this build of llama.cpp can keep layers on a GPU."""
    initialise_backend()  # backends that are libraries of their own are not known before
    return bool(llama_cpp.llama_supports_gpu_offload())
