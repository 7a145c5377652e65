# Volary in a container: `docker build -t volary .` for CPUs,
# `docker build -t volary:cuda --build-arg DEVICE=cuda .` for NVIDIA GPUs. libtorch comes from PyTorch's wheels.
ARG DEVICE=cpu

FROM rust:1.91-bookworm AS builder
ARG DEVICE
# The index of the wheels for each device; a mirror may replace it.
ARG TORCH_INDEX_CPU=https://download.pytorch.org/whl/cpu
ARG TORCH_INDEX_CUDA=https://download.pytorch.org/whl/cu128
RUN apt-get update \
    && apt-get install -y --no-install-recommends python3-venv g++ \
    && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/torch \
    && if [ "$DEVICE" = cuda ]; then index="$TORCH_INDEX_CUDA"; else index="$TORCH_INDEX_CPU"; fi \
    && /opt/torch/bin/pip install --no-cache-dir --index-url "$index" torch==2.11.0
WORKDIR /src
COPY . .
# torch-sys finds libtorch through this Python.
ENV LIBTORCH_USE_PYTORCH=1 LIBTORCH_BYPASS_VERSION_CHECK=1 PATH=/opt/torch/bin:$PATH
RUN cargo build --release --locked --bin volary \
    && mkdir -p /out/lib \
    && strip -o /out/volary target/release/volary \
    && torch=$(python3 -c "import pathlib, torch; print(pathlib.Path(torch.__file__).parent)") \
    && cp -a "$torch"/lib/*.so* /out/lib/ \
    # CUDA's libraries are in wheels of their own.
    && if [ -d "$torch/../nvidia" ]; then find "$torch/../nvidia" -name '*.so*' -exec cp -a {} /out/lib/ \; ; fi \
    && rm -f /out/lib/libtorch_python.so

FROM debian:bookworm-slim
RUN apt-get update \
    && apt-get install -y --no-install-recommends ca-certificates libgomp1 libstdc++6 \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 10001 --user-group --no-create-home --shell /usr/sbin/nologin volary \
    && install -d -o volary -g volary /var/lib/volary
COPY --from=builder /out/lib /usr/local/lib/volary
COPY --from=builder /out/volary /usr/local/bin/volary
COPY examples /usr/local/share/volary/examples
ENV LD_LIBRARY_PATH=/usr/local/lib/volary
USER 10001:10001
WORKDIR /var/lib/volary
# QUIC; the dashboard; a node's metrics.
EXPOSE 7100/udp 7680/tcp 9464/tcp
ENTRYPOINT ["volary"]
CMD ["--help"]
