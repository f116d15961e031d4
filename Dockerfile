# Builds the wheel and installs it into an image that has nothing of the sources or the compilers.
#
#     docker build -t evakernels .                                 with the kernels for CPUs
#     docker build -t evakernels:cuda --build-arg VARIANT=cuda .   and those for GPUs, for all that are supported
#     docker run --rm evakernels train tiny
#     docker run --rm --gpus all evakernels:cuda doctor
#
# Both images need the same Python. The C++ library of PYTHON_IMAGE must not be older than the build image's.
ARG VARIANT=cpu
ARG PYTHON_IMAGE=python:3.12-slim-trixie
ARG CUDA_IMAGE=nvidia/cuda:13.0.1-devel-ubuntu24.04

FROM ${PYTHON_IMAGE} AS build-cpu
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*
ENV EVAKERNELS_CUDA=off

FROM ${CUDA_IMAGE} AS build-cuda
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*
# No GPU is there while an image is built.
ENV EVAKERNELS_CUDA=on EVAKERNELS_CUDA_ARCHS=all

FROM build-${VARIANT} AS build
# An index with torch's builds for CPUs only spares the CPU image several GB; without one, pip's own index serves.
ARG TORCH_INDEX=
RUN python3 -m venv /build \
    && /build/bin/pip install --no-cache-dir ${TORCH_INDEX:+--index-url "${TORCH_INDEX}"} torch \
    && /build/bin/pip install --no-cache-dir setuptools cmake ninja pybind11
ENV PATH=/build/bin:${PATH}
COPY . /source
RUN EVAKERNELS_NATIVE=on pip wheel --no-build-isolation --no-deps --wheel-dir /wheels /source

FROM ${PYTHON_IMAGE}
ARG TORCH_INDEX=
ARG EXTRAS=clip
RUN --mount=type=bind,from=build,source=/wheels,target=/wheels \
    pip install --no-cache-dir ${TORCH_INDEX:+--index-url "${TORCH_INDEX}"} torch \
    && pip install --no-cache-dir "$(ls /wheels/*.whl)[${EXTRAS}]" \
    && useradd --create-home user
USER user
WORKDIR /home/user
ENTRYPOINT ["evaclip"]
CMD ["doctor"]
