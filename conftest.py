"""For tests and lessons alike, also when only one is run: no network, the quick profile."""

import os
import sys
from pathlib import Path

OFFLINE = str(Path(__file__).resolve().parent / "tests" / "offline")
NOWHERE = "http://127.0.0.1:9"  # the discard port: what honours a proxy, in any language, gets no further

# Before any test module is imported; kernels and other processes that tests start inherit all of it.
os.environ |= {
    "MINIVLP_PROFILE": "quick",
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "PYTHONPATH": os.pathsep.join(filter(None, [OFFLINE, os.environ.get("PYTHONPATH")])),
    **dict.fromkeys(["http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "all_proxy"], NOWHERE),
    **dict.fromkeys(["no_proxy", "NO_PROXY"], "localhost,127.0.0.1,::1"),
}
if "NetworkBlocked" not in vars(sys.modules.get("sitecustomize", object)):  # not yet done by PYTHONPATH
    sys.modules.pop("sitecustomize", None)
    sys.path.insert(0, OFFLINE)
    import sitecustomize  # noqa: F401
