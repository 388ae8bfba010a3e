# The training image for H100 clusters: NVIDIA's PyTorch with its own torch, NCCL and Transformer Engine, and this package beside them.
#
#   docker build -t megatron-lite .
#   docker run --rm --gpus all -v "$PWD:/workspace" megatron-lite train experiment=smoke
#   enroot import -o megatron-lite.sqsh dockerd://megatron-lite       (Slurm: CONTAINER=megatron-lite.sqsh)
#
# 26.05: PyTorch 2.12, CUDA 13.2. Another tag: --build-arg BASE=... (its torch must satisfy pyproject.toml).
ARG BASE=nvcr.io/nvidia/pytorch:26.05-py3
FROM ${BASE}
SHELL ["/bin/bash", "-euo", "pipefail", "-c"]

WORKDIR /opt/megatron-lite
COPY pyproject.toml README.md constraints.txt ./
COPY configs configs
COPY launch launch
COPY megatron_lite megatron_lite
COPY data_tools data_tools
# Fails when a package of the base (torch and Transformer Engine first of all) came out of it with another version. DeepSpeed compiles
# its operators where they are used, if ever: nothing is built here.
RUN DS_BUILD_OPS=0 launch/container_install.sh . "[deepspeed]"

# Not root: what a run writes belongs to a user. Slurm and Kubernetes bring a user of their own.
RUN useradd --create-home --uid 2000 mlite && mkdir -p /workspace && chown mlite:mlite /workspace
USER 2000
WORKDIR /workspace
ENV PYTHONUNBUFFERED=1
ENTRYPOINT ["mlite"]
CMD ["--help"]
