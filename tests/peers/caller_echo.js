// Responds to every request with its x-forwarded-client-cert: the identity that the service would see.
const server = require("http").createServer((request, response) => {
  request.resume();
  response.end(`caller=${request.headers["x-forwarded-client-cert"]}\n`);
});
server.listen(0, "127.0.0.1", () => console.log(`port ${server.address().port}`));
