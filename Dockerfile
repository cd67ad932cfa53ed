# syntax=docker/dockerfile:1
# One image for all components: Ray head and workers, job drivers, the MLflow server, and Serve replicas.
#
#   docker build --tag tla-service:0.1.0 .                                 with CUDA, as in torch's wheel on PyPI
#   docker build --tag tla-service:0.1.0-cpu --build-arg VARIANT=cpu .     CPU only
#
# Packages are pinned by hash in requirements.lock, which the tests use as well.
ARG PYTHON_IMAGE=python:3.11.16-slim-bookworm@sha256:2e32f7d302adc1c37428355c1e646897c0c53f4fd60b6a551245fb90ee129f91

FROM ${PYTHON_IMAGE} AS dependencies
ARG VARIANT=cuda
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /build
COPY requirements.lock deploy/image/torch-cpu.txt ./
# Every pinned file is verified against its hash. Without CUDA, torch and torchvision come from PyTorch's own index, and
# the libraries that only their CUDA builds need are left out.
RUN case "${VARIANT}" in \
        cuda) cp requirements.lock wanted.txt ;; \
        cpu) awk '/^[a-z]/ { drop = /^(torch|torchvision|triton|cuda-[a-z]+|nvidia-[a-z0-9-]+)==/ && !/^nvidia-ml-py==/ } !drop' \
                requirements.lock > wanted.txt \
            && vision="$(sed -n 's/^torchvision==\([0-9.]*\).*/\1/p' requirements.lock)+cpu" \
            && index=https://download.pytorch.org/whl/cpu \
            && pip wheel --require-hashes --no-deps --wheel-dir /wheels --index-url "${index}" --requirement torch-cpu.txt \
            && pip wheel --no-deps --wheel-dir /wheels --index-url "${index}" "torchvision==${vision}" ;; \
        *) echo "VARIANT is cuda or cpu, not ${VARIANT}" >&2; exit 2 ;; \
    esac \
    && pip wheel --require-hashes --no-deps --wheel-dir /wheels --requirement wanted.txt
COPY pyproject.toml ./
# pip installs what the service needs from these files only; linters and test tools remain in this stage.
RUN python -c "import tomllib; project = tomllib.load(open('pyproject.toml', 'rb'))['project']; extras = project['optional-dependencies']; print(*project['dependencies'], *extras['serve'], *extras['server'], *extras['export'], sep='\n')" > needed.txt \
    && python -m venv --without-pip /opt/tla \
    && pip --python /opt/tla/bin/python install --no-index --find-links /wheels --requirement needed.txt

FROM dependencies AS package
RUN python -m venv /opt/build \
    && /opt/build/bin/pip install --no-index --find-links /wheels hatchling
COPY README.md LICENSE ./
COPY tla_service tla_service
RUN /opt/build/bin/pip wheel --no-deps --no-index --no-build-isolation --wheel-dir /package .

FROM ${PYTHON_IMAGE} AS service
ARG VARIANT=cuda
ARG REVISION
LABEL org.opencontainers.image.title="tla-service" \
      org.opencontainers.image.description="Train, track and serve adversarially robust image classifiers" \
      org.opencontainers.image.version="0.1.0" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.base.name="docker.io/library/python:3.11.16-slim-bookworm"
# KubeRay's health probes call wget. `ray up` calls ssh and rsync on the head, rsync on each node, and commands in login
# shells, whose PATH /etc/profile sets. A pinned version would break with Debian's next security update.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends openssh-client rsync wget \
    && rm -rf /var/lib/apt/lists/* \
    && echo "PATH=/opt/tla/bin:\${PATH}" > /etc/profile.d/tla.sh \
    && useradd --create-home --uid 1000 --user-group tla \
    && install --directory --owner=1000 --group=1000 /cache /tmp/ray /home/tla/.mlflow /home/tla/service/runs
COPY --from=dependencies /opt/tla /opt/tla
WORKDIR /home/tla/service
COPY --chown=1000:1000 jobs jobs
# Standalone scripts: the serving application and account setup.
COPY --chown=1000:1000 deploy/*.py deploy/
# The project comes last, so that a code change rebuilds a small layer only.
RUN --mount=type=bind,from=package,source=/package,target=/package \
    pip --python /opt/tla/bin/python install --no-cache-dir --no-deps --no-index /package/*.whl
ENV PATH=/opt/tla/bin:${PATH} \
    PYTHONPATH=/home/tla/service \
    PYTHONUNBUFFERED=1 \
    XDG_CACHE_HOME=/tmp/cache \
    MPLCONFIGDIR=/tmp/cache/matplotlib \
    RAY_AUTH_MODE=token \
    RAY_USAGE_STATS_ENABLED=0 \
    MLFLOW_DISABLE_TELEMETRY=true \
    GIT_COMMIT=${REVISION}
# The root file system may be read-only: only /tmp, /cache and runs are written to.
USER 1000:1000
# For Ray nodes, head or worker. Other uses of the image override it.
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --retries=6 \
    CMD ["wget", "--quiet", "--tries=1", "--output-document=-", "http://127.0.0.1:52365/api/local_raylet_healthz"]
CMD ["python", "jobs/train_tla.py", "--help"]
