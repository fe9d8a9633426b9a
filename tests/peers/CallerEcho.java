// Responds to every request with its x-forwarded-client-cert: the identity that the service would see.
import com.sun.net.httpserver.HttpServer;
import java.net.InetSocketAddress;

public class CallerEcho {
    public static void main(String[] arguments) throws Exception {
        HttpServer server = HttpServer.create(new InetSocketAddress("127.0.0.1", 0), 50);
        server.createContext("/", exchange -> {
            String caller = exchange.getRequestHeaders().getFirst("X-Forwarded-Client-Cert");
            System.out.println("request " + caller);
            byte[] body = ("caller=" + caller + "\n").getBytes();
            exchange.sendResponseHeaders(200, body.length);
            exchange.getResponseBody().write(body);
            exchange.close();
        });
        server.start();
        System.out.println("port " + server.getAddress().getPort());
    }
}
