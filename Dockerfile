# syntax=docker/dockerfile:1
# seer on NVIDIA GPUs, with pillow-simd. The driver comes from the host (NVIDIA Container Toolkit), the CUDA libraries from
# torch's own wheels, so a plain Python image is enough and an nvidia/cuda base would only hold them twice.
# Not built yet: written without a Docker engine at hand; the build stage's commands were run natively with Python 3.12.
#
#   docker build -t seer .      # older CPUs without AVX2: --build-arg PILLOW_SIMD_FLAGS=--no-avx2
#   docker run --rm --gpus all --shm-size=16g --user "$(id -u):$(id -g)" \
#     -v /data/shards:/shards:ro -v "$PWD/runs":/runs \
#     seer train experiment=small data.shards='/shards/*.tar' run_dir=/runs/small
#
# --shm-size  NCCL connects the GPUs of a machine through /dev/shm, where Docker gives 64 MB; data workers do not use it.
# -v          shards read-only (their indexes lie beside them, or in data.index_dir); everything that a run keeps is in its
#             run_dir, so mount that from outside or the run dies with the container.
# --user      so that the run's files belong to you; without it they belong to the image's user 1000.

FROM python:3.12-slim-bookworm AS build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
RUN python -m venv /opt/seer
ENV PATH=/opt/seer/bin:$PATH
WORKDIR /src
# From what changes least to what changes most: torch (gigabytes), pillow-simd (compiled), seer.
COPY pyproject.toml ./
RUN --mount=type=cache,target=/root/.cache/pip \
    python -c "import tomllib; print('\n'.join(tomllib.load(open('pyproject.toml', 'rb'))['project']['dependencies']))" \
      > dependencies.txt && pip install -r dependencies.txt tensorboard 'simplejpeg>=1.8'
COPY data_shards/install_pillow_simd.sh data_shards/
ARG PILLOW_SIMD_FLAGS=
RUN data_shards/install_pillow_simd.sh $PILLOW_SIMD_FLAGS
COPY README.md LICENSE ./
COPY seer seer
COPY conf conf
RUN pip install --no-deps . && pip check

FROM python:3.12-slim-bookworm
# What pillow-simd was linked against, and a C compiler: torch compiles colour and blur for the GPU when a run starts.
RUN apt-get update && apt-get install -y --no-install-recommends \
      gcc libc6-dev libjpeg62-turbo libtiff6 libwebp7 libwebpdemux2 libwebpmux3 && rm -rf /var/lib/apt/lists/*
COPY --from=build /opt/seer /opt/seer
ENV PATH=/opt/seer/bin:$PATH PYTHONUNBUFFERED=1 NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
RUN python -c "from PIL import features; assert all(map(features.check, ('jpg', 'webp', 'zlib', 'libtiff')))" && seer --help
RUN useradd --create-home --uid 1000 seer
USER seer
WORKDIR /home/seer
ENTRYPOINT ["seer"]
CMD ["--help"]
