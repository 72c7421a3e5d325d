"""python -m tests.fake_cuda.child MODULE FUNCTION ARGUMENTS ANSWER: one call of `FakeCuda.run`."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from pathlib import Path

from tests.fake_cuda import cudnn


def main(module_path: str, function: str, arguments: str, answer: str) -> None:
    spec = importlib.util.spec_from_file_location("module_under_test", module_path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    library = cudnn.install()
    Path(answer).write_text(json.dumps(getattr(module, function)(*json.loads(arguments))))
    del library


if __name__ == "__main__":
    main(*sys.argv[1:])
    os._exit(0)  # at once: threads of torch's may abort a process that takes its libraries down under load
