# Encoder, DiT, VAE and cache store: everything with torch in it. Built from the repository's root.
# By default pip takes the torch wheel that its index offers; give TORCH_INDEX a wheel index for another build of it.
FROM python:3.11-slim
ARG TORCH_INDEX=
WORKDIR /app
ENV PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
COPY constraints.txt ./
RUN pip install --no-cache-dir -c constraints.txt ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} torch
RUN pip install --no-cache-dir -c constraints.txt \
    av diffusers msgpack nats-py numpy pillow prometheus-client pydantic pydantic-settings pyyaml safetensors \
    structlog tokenizers transformers ucxx-cu12 uvloop
COPY common/ common/
COPY compose/ compose/
COPY services/ services/
RUN useradd --system --create-home triptych && mkdir -p /var/lib/cache_store && chown triptych /var/lib/cache_store
USER triptych
ENTRYPOINT ["python", "-m", "compose.entrypoint"]
