# The training image for H100 clusters: NVIDIA's PyTorch with its own torch, NCCL and Transformer Engine, and this package beside them.
#
#   docker build -t registry.example/mlite:1 . && docker push registry.example/mlite:1
#   docker run --rm --gpus all --ipc=host --ulimit memlock=-1 --ulimit stack=67108864 -v "$PWD:/workspace" registry.example/mlite:1 \
#     train experiment=smoke
#   enroot import -o mlite.sqsh 'docker://registry.example#mlite:1'       (Slurm: CONTAINER=mlite.sqsh)
#
# launch/README.md has a way without docker. 26.05: PyTorch 2.12, CUDA 13.2, which needs driver 580 or newer (older data-center drivers:
# through the forward-compatibility libraries of the image). Another tag: --build-arg BASE=... (its torch must satisfy pyproject.toml).
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
RUN DS_BUILD_OPS=0 launch/container_install.sh . "[deepspeed,sample]"

# NVIDIA's entry point makes an older driver usable (CUDA forward compatibility); another base has none.
RUN printf '%s\n' '#!/bin/bash' 'nvidia=/opt/nvidia/nvidia_entrypoint.sh' '[[ ! -x $nvidia ]] || exec "$nvidia" mlite "$@"' 'exec mlite "$@"' \
  >/usr/local/bin/mlite-entrypoint && chmod +x /usr/local/bin/mlite-entrypoint

# Not root: what a run writes belongs to a user. Slurm and Kubernetes bring a user of their own.
RUN useradd --create-home --uid 2000 mlite && mkdir -p /workspace && chown mlite:mlite /workspace
USER 2000
WORKDIR /workspace
# NVIDIA's images round every fp32 matmul to TF32; precision=fp32 means fp32.
ENV PYTHONUNBUFFERED=1 TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=0
ENTRYPOINT ["mlite-entrypoint"]
CMD ["--help"]
