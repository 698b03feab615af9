# syntax=docker/dockerfile:1
# An image whose entry is `lost`:
#   docker build -t lost:0.1.0 --build-arg COMMIT="$(git rev-parse HEAD)" .
#   docker run --rm --gpus all --shm-size=16g -v "$PWD/runs:/workspace/runs" lost:0.1.0 pretrain
#   docker run --rm --gpus all --shm-size=16g --entrypoint torchrun lost:0.1.0 --standalone --nproc-per-node=8 -m lost pretrain

# devel, not runtime: Triton and torch.compile need a C compiler, DeepSpeed builds its operators with nvcc at first use.
# The version of CUDA is that of torch's own build for constraints.txt's version.
FROM nvidia/cuda:13.0.2-devel-ubuntu24.04

# Ubuntu removes old versions of packages from its mirrors, so that a pinned one would break the build.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends build-essential git python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*

# Ubuntu's Python refuses packages outside a virtual environment.
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1
RUN python3 -m venv /opt/venv

# What `lost` needs, without its source: a change of the source leaves these gigabytes in the cache.
WORKDIR /opt/lost
COPY pyproject.toml constraints.txt ./
RUN python -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['dependencies'], sep='\n')" \
      > requirements.txt \
    && pip install --no-cache-dir -r requirements.txt -c constraints.txt

COPY . .
RUN pip install --no-cache-dir --no-deps .

# Ubuntu's image has a user with id 1000 already; scripts/kubernetes/pytorchjob.yaml names this one by its number.
RUN groupadd --gid 10001 lost \
    && useradd --uid 10001 --gid 10001 --create-home lost \
    && mkdir -p /workspace/runs \
    && chown -R lost:lost /workspace
USER 10001:10001
WORKDIR /workspace

# An image holds no git: versions.json of a run takes its commit from here.
ARG COMMIT=""
ENV LOST_COMMIT=$COMMIT

ENTRYPOINT ["lost"]
CMD ["--help"]
