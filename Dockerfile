# farstep in a container. deploy/README.md says how to run it, what it costs and why it is built this way.
#
#   docker build -t farstep .                                            CPU
#   docker build -t farstep:cuda --build-arg TORCH=cuda .                CUDA
#   docker build -t farstep --target uncompiled .                        without kernels built ahead
#
# builder      makes a virtual environment: the wheel of this tree and the versions of deploy/constraints.txt
# uncompiled   what runs: Python, that environment, g++, a user without rights
# server       the same, with kernels built ahead for the processor of the machine that builds

# Pin the digest for a release: --build-arg BASE=python:3.11-slim-bookworm@sha256:...
ARG BASE=python:3.11-slim-bookworm


FROM ${BASE} AS builder

# cpu or cuda: which torch this image is for. pip chooses from its index; a CUDA image that got a CPU torch is refused.
ARG TORCH=cpu
# A package index beside pip's own, such as PyTorch's index of CPU wheels. Whatever needs a password or a certificate
# belongs into a pip.conf given as a secret, which stays out of the image: --secret id=pip_conf,src=pip.conf
ARG PIP_EXTRA_INDEX_URL=""
# `service` alone leaves out scikit-learn and the digits of the demo.
ARG EXTRAS=service,demo

ENV PIP_CONFIG_FILE=/run/secrets/pip_conf \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_ROOT_USER_ACTION=ignore

WORKDIR /build
RUN python3 -m venv --without-pip /opt/farstep/venv

# The dependencies before the sources: a change of the sources leaves this layer, the big one, as it is.
COPY pyproject.toml deploy/constraints.txt ./
RUN --mount=type=cache,target=/root/.cache/pip --mount=type=secret,id=pip_conf <<'SH'
set -eu
python3 - >requirements.txt <<'PY'
import os, tomllib
project = tomllib.load(open("pyproject.toml", "rb"))["project"]
extras = [extra.strip() for extra in os.environ["EXTRAS"].split(",") if extra.strip()]
optional = (each for extra in extras for each in project["optional-dependencies"][extra])
print(*project["dependencies"], *optional, sep="\n")
PY
pip --python /opt/farstep/venv/bin/python install --constraint constraints.txt --requirement requirements.txt
# torch brings its own C++ tests along.
rm -rf /opt/farstep/venv/lib/python3*/site-packages/torch/test
find /opt/farstep/venv/lib/python3*/site-packages/torch/bin -iname '*test*' -type f -delete
/opt/farstep/venv/bin/python - <<'PY'
import os, sys, torch
wanted, found = os.environ["TORCH"], torch.version.cuda
if wanted not in ("cpu", "cuda"):
    sys.exit(f"TORCH={wanted}: there are cpu and cuda.")
if wanted == "cuda" and not found:
    sys.exit(f"TORCH=cuda, and pip chose torch {torch.__version__}, which has no CUDA. See deploy/README.md.")
if wanted == "cpu" and found:
    print(f"torch {torch.__version__} brings CUDA {found}, several GB that TORCH=cpu does not use. See deploy/README.md.")
PY
SH

COPY LICENSE README.md ./
COPY client client
COPY service service
RUN --mount=type=cache,target=/root/.cache/pip --mount=type=secret,id=pip_conf <<'SH'
set -eu
PIP_CONSTRAINT=/build/constraints.txt pip wheel --no-deps --wheel-dir dist .
pip --python /opt/farstep/venv/bin/python install --no-deps dist/farstep-*.whl
SH


FROM ${BASE} AS uncompiled

# Fused kernels are shared libraries made by g++ for one processor. Those built ahead (below) are loaded only where the
# processor has the same instructions; anywhere else the server makes its own, in the background, and steps with the
# reference kernels until they are there. That is why the compiler stays in the image.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/* /var/cache/apt/* /var/log/apt /var/log/dpkg.log

# /tmp is the only place the user needs to write to apart from the kernels and the sessions, so it is also the home.
RUN groupadd --gid 10001 farstep \
    && useradd --uid 10001 --gid 10001 --home-dir /tmp --no-create-home --shell /usr/sbin/nologin farstep \
    && install --directory --owner=farstep --group=farstep --mode=0700 /opt/farstep/kernels /var/lib/farstep

COPY --from=builder /opt/farstep/venv /opt/farstep/venv

# PASSIVE: threads of a step that wait for each other must not spin; on two busy cores a step is 50 times slower then.
ENV PATH=/opt/farstep/venv/bin:$PATH \
    FARSTEP_KERNEL_CACHE=/opt/farstep/kernels \
    FARSTEP_SERVE_DATA_DIR=/var/lib/farstep \
    OMP_WAIT_POLICY=PASSIVE \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1

USER 10001:10001
WORKDIR /tmp
# Sessions outlive the server's process, and the container if a volume with a name is mounted here.
VOLUME /var/lib/farstep
EXPOSE 7171
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --start-interval=2s --retries=3 \
    CMD ["farstep", "healthcheck"]
ENTRYPOINT ["farstep"]
# Listening beyond loopback needs a token: FARSTEP_TOKEN.
CMD ["serve", "--host", "0.0.0.0"]

ARG VERSION=0.2.0.dev0
ARG REVISION=""
ARG CREATED=""
ARG SOURCE=""
ARG DOCUMENTATION=""
LABEL org.opencontainers.image.title="farstep" \
      org.opencontainers.image.description="An optimizer as a service: optimizer state and update steps live on a server." \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.created="${CREATED}" \
      org.opencontainers.image.source="${SOURCE}" \
      org.opencontainers.image.documentation="${DOCUMENTATION}"


FROM uncompiled AS server

# Which element types to build kernels for; a server builds the others when a session asks for them. Nothing for
# --build-arg TORCH=cuda: a build reaches no GPU, so the first server that has one makes them.
ARG KERNEL_DTYPES=float32
ARG TORCH=cpu
RUN --mount=type=tmpfs,target=/tmp <<'SH'
set -eu
if [ "$TORCH" = cpu ]; then farstep warmup --device cpu --dtypes "$KERNEL_DTYPES"; fi
rm -rf "$FARSTEP_KERNEL_CACHE/inductor"  # what the compiler keeps for itself
SH
