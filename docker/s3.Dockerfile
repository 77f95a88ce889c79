# SeaweedFS as its own user from the start, with secrets from files; the image itself starts as root to own its folder.
FROM chrislusf/seaweedfs:4.48

RUN mkdir /store && chown 1000:1000 /store
COPY with-secrets /usr/local/bin/
USER 1000:1000
ENTRYPOINT ["sh", "/usr/local/bin/with-secrets", "weed"]
