"""Give every test the same surroundings, whoever starts pytest and from whichever shell."""

import os

from hypothesis import settings

# Two OpenMP threads on two busy cores spin while they wait. This must be set before the first import of torch.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# A server, session or token that the developer uses must not leak into the tests. The kernel cache may be shared.
for name in [name for name in os.environ if name.startswith("FARSTEP_") and name != "FARSTEP_KERNEL_CACHE"]:
    del os.environ[name]

# A machine that is busy with other tests is not a reason to fail.
settings.register_profile("farstep", deadline=None, print_blob=True)
settings.load_profile("farstep")
