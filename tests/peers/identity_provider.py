"""An identity provider based on Authlib: an OAuth 2 token endpoint, keys that rotate, and an API that verifies its tokens.

usage: identity_provider.py CERTIFICATE KEY CLIENT_ID CLIENT_SECRET    prints its port

GET /jwks, POST /token (client credentials), GET /api (asks for a token of /token)
POST /sign?alg=ES256: a token as an end user would have; POST /rotate, /forget: new keys, old ones away
POST /revoke: the tokens given so far are not taken any more
"""

import logging
import sys
import time

from authlib.integrations.flask_oauth2 import AuthorizationServer, ResourceProtector
from authlib.oauth2.rfc6749 import ClientMixin, TokenMixin, grants
from authlib.oauth2.rfc6750 import BearerTokenValidator
from flask import Flask, jsonify, request
from joserfc import jwt
from joserfc.jwk import ECKey, KeySet, OKPKey, RSAKey
from werkzeug.serving import make_server

certificate, key, client_id, client_secret = sys.argv[1:]
ISSUER = "https://id.example"


class Client(ClientMixin):
    client_id = client_id

    def get_client_id(self):
        return client_id

    def check_client_secret(self, secret):
        return secret == client_secret

    def check_endpoint_auth_method(self, method, endpoint):
        return method == "client_secret_basic"

    def check_grant_type(self, grant):
        return grant == "client_credentials"

    def get_allowed_scope(self, scope):
        return " ".join(word for word in (scope or "").split() if word == "pay")


class Token(TokenMixin):
    def __init__(self, given):
        self.scope, self.until, self.revoked = given["scope"], time.time() + given["expires_in"], False

    def get_scope(self):
        return self.scope

    def is_expired(self):
        return self.until < time.time()

    def is_revoked(self):
        return self.revoked


class Validator(BearerTokenValidator):
    def authenticate_token(self, text):
        return tokens.get(text)


class Basic(grants.ClientCredentialsGrant):
    TOKEN_ENDPOINT_AUTH_METHODS = ["client_secret_basic"]


def made_keys():
    made = {"RS256": RSAKey.generate_key(2048), "ES256": ECKey.generate_key("P-256"), "EdDSA": OKPKey.generate_key("Ed25519")}
    for made_key in made.values():
        made_key.ensure_kid()
    return made


tokens, generations = {}, [made_keys()]
app = Flask(__name__)
app.config["OAUTH2_TOKEN_EXPIRES_IN"] = {"client_credentials": 600}
server = AuthorizationServer(
    app,
    query_client=lambda name: Client() if name == client_id else None,
    save_token=lambda given, _: tokens.update({given["access_token"]: Token(given)}),
)
server.register_grant(Basic)
protected = ResourceProtector()
protected.register_token_validator(Validator())


@app.get("/jwks")
def jwks():
    return KeySet([key for keys in generations for key in keys.values()]).as_dict(private=False)


@app.post("/token")
def token():
    return server.create_token_response()


@app.get("/api")
@protected("pay")
def api():
    return jsonify(paid=True)


@app.post("/sign")
def sign():
    algorithm = request.args["alg"]
    signer = generations[-1][algorithm]
    claims = {"iss": ISSUER, "aud": "checkout", "sub": "ann", "exp": int(time.time()) + 300}
    return jwt.encode({"alg": algorithm, "kid": signer.kid}, claims, signer, algorithms=[algorithm])


@app.post("/rotate")
def rotate():
    generations.append(made_keys())
    return "rotated"


@app.post("/forget")
def forget():
    del generations[:-1]
    return "forgotten"


@app.post("/revoke")
def revoke():
    for given in tokens.values():
        given.revoked = True
    return str(len(tokens))


logging.getLogger("werkzeug").setLevel(logging.ERROR)
listening = make_server("127.0.0.1", 0, app, threaded=True, ssl_context=(certificate, key))
print(f"port {listening.server_port}", flush=True)
listening.serve_forever()
