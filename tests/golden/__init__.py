"""Golden vectors: what a GPU makes of each wrapper in `kernels/ptx*.cuh`, kept so that the emulator can be
held to it on machines without one.

    python -m tests.golden list                 the items, and whether each has been recorded
    python -m tests.golden record [--out DIR]   run them all on this machine's GPU, keep what came out

`items.py` has the table: one micro-kernel (in `kernels/`), its inputs, what an independent computation
expects of it, and a rule that says how near is right. `vectors/<item>.npz` holds inputs and outputs of a
recording, `kernels/golden.json` its summary, which `cnnops.cuda.golden` reads. `tests/test_golden.py` replays
the vectors.
"""
