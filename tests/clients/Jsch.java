import com.jcraft.jsch.ChannelSftp;
import com.jcraft.jsch.JSch;
import com.jcraft.jsch.Session;

/**
 * Logs in with JSch, puts a file and gets it back.
 *
 * <p>Arguments: port, known_hosts, "key" or "password", the key's file or the password, a file, its name on the server,
 * where to put what comes back.
 */
public class Jsch {
    public static void main(String[] args) throws Exception {
        JSch jsch = new JSch();
        jsch.setKnownHosts(args[1]);
        Session session = jsch.getSession("alice", "127.0.0.1", Integer.parseInt(args[0]));
        if (args[2].equals("key")) {
            jsch.addIdentity(args[3]);
        } else {
            session.setPassword(args[3]);
        }
        session.connect();
        ChannelSftp sftp = (ChannelSftp) session.openChannel("sftp");
        sftp.connect();
        sftp.put(args[4], args[5]);
        sftp.get(args[5], args[6]);
        session.disconnect();
    }
}
