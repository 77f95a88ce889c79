# vLLM's own image, with a user who is not root and with secrets from files. The version is pyproject.toml's `vllm` extra.
FROM vllm/vllm-openai:v0.32.0

RUN useradd --create-home --uid 10001 app \
 && install --directory --owner app /models /adapters
COPY with-secrets /usr/local/bin/
USER app
ENV HF_HOME=/models
ENTRYPOINT ["sh", "/usr/local/bin/with-secrets"]
