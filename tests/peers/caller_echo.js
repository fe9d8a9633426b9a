// Answers every request with who called, as the request says.
const server = require("http").createServer((request, response) => {
  request.resume();
  response.end(`caller=${request.headers["x-forwarded-client-cert"]}\n`);
});
server.listen(0, "127.0.0.1", () => console.log(`port ${server.address().port}`));
