// The errand of tests/interop.rs with JSch.

import com.jcraft.jsch.Channel;
import com.jcraft.jsch.ChannelSftp;
import com.jcraft.jsch.JSch;
import com.jcraft.jsch.Session;
import com.jcraft.jsch.SftpException;
import java.io.ByteArrayInputStream;
import java.io.InputStream;
import java.nio.charset.StandardCharsets;
import java.nio.file.Files;
import java.nio.file.Path;
import java.util.Arrays;
import java.util.List;
import java.util.TreeSet;
import java.util.Vector;
import java.util.stream.Collectors;
import java.util.stream.Stream;

final class JschErrand {
    private static final int TIMEOUT_MILLISECONDS = 60_000;

    private final Session session;
    private final ChannelSftp sftp;

    private JschErrand(String port, String knownHosts, String key, String password) throws Exception {
        JSch jsch = new JSch();
        jsch.setKnownHosts(knownHosts);
        if (key != null) {
            jsch.addIdentity(key);
        }
        session = jsch.getSession("alice", "127.0.0.1", Integer.parseInt(port));
        session.setPassword(password);
        session.setConfig("PreferredAuthentications", key != null ? "publickey" : "password");
        session.connect(TIMEOUT_MILLISECONDS);
        Channel channel = session.openChannel("sftp");
        channel.connect(TIMEOUT_MILLISECONDS);
        sftp = (ChannelSftp) channel;
    }

    public static void main(String[] args) {
        try {
            run(args);
        } catch (Throwable error) {
            error.printStackTrace();
            // The threads of an open session would keep the process.
            System.exit(1);
        }
    }

    private static void run(String[] args) throws Exception {
        JschErrand withPassword = new JschErrand(args[0], args[1], null, args[3]);
        check(withPassword.names(".").isEmpty(), "the home is empty");
        withPassword.session.disconnect();
        JschErrand withKey = new JschErrand(args[0], args[1], args[2], null);
        withKey.copyUp(Path.of("tree"));
        withKey.copyDown("up");
        withKey.manage();
        withKey.edit();
        withKey.readWhole();
        withKey.session.disconnect();
    }

    private static void check(boolean holds, String what) {
        if (!holds) {
            throw new AssertionError(what);
        }
    }

    /** JSch expands these in paths. */
    private static String quoted(String path) {
        return path.replaceAll("([*?\\\\])", "\\\\$1");
    }

    private interface Call {
        void run() throws Exception;
    }

    private static void fails(int code, String words, Call call) throws Exception {
        try {
            call.run();
        } catch (SftpException error) {
            check(error.id == code && error.getMessage().contains(words), error.toString());
            return;
        }
        throw new AssertionError("should have failed: " + words);
    }

    private TreeSet<String> names(String directory) throws Exception {
        Vector<?> entries = sftp.ls(quoted(directory));
        TreeSet<String> names = new TreeSet<>();
        for (Object entry : entries) {
            names.add(((ChannelSftp.LsEntry) entry).getFilename());
        }
        names.removeAll(List.of(".", ".."));
        return names;
    }

    private void copyUp(Path local) throws Exception {
        String remote = local.toString().replaceFirst("tree", "up");
        if (Files.isDirectory(local)) {
            sftp.mkdir(remote);
            try (Stream<Path> entries = Files.list(local)) {
                for (Path entry : entries.collect(Collectors.toList())) {
                    copyUp(entry);
                }
            }
            return;
        }
        sftp.put(quoted(local.toString()), quoted(remote));
        check(sftp.stat(quoted(remote)).getSize() == Files.size(local), remote);
    }

    private void copyDown(String remote) throws Exception {
        Path local = Path.of(remote.replaceFirst("up", "down"));
        if (!sftp.stat(quoted(remote)).isDir()) {
            sftp.get(quoted(remote), local.toString());
            return;
        }
        Files.createDirectory(local);
        TreeSet<String> names = names(remote);
        check(names.equals(new TreeSet<>(Arrays.asList(Path.of(remote.replaceFirst("up", "tree")).toFile().list()))), remote);
        for (String name : names) {
            copyDown(remote + "/" + name);
        }
    }

    private void manage() throws Exception {
        sftp.rename("up/hello.txt", "up/renamed");
        // JSch renames with posix-rename, which replaces.
        sftp.put("begun", "up/replaced");
        sftp.rename("up/renamed", "up/replaced");
        sftp.rename("up/replaced", "up/renamed");
        fails(ChannelSftp.SSH_FX_FAILURE, "Failure", () -> sftp.rmdir("up/sub"));
        fails(ChannelSftp.SSH_FX_FAILURE, "Failure", () -> sftp.mkdir("up/sub"));
        fails(ChannelSftp.SSH_FX_NO_SUCH_FILE, "No such file", () -> sftp.stat("up/missing"));
        fails(ChannelSftp.SSH_FX_NO_SUCH_FILE, "No such file", () -> sftp.get("up/missing"));
        fails(ChannelSftp.SSH_FX_NO_SUCH_FILE, "No such file", () -> sftp.rm("up/missing"));
        fails(ChannelSftp.SSH_FX_NO_SUCH_FILE, "No such file", () -> sftp.ls("up/missing"));
        fails(ChannelSftp.SSH_FX_NO_SUCH_FILE, "No such file", () -> sftp.rename("up/missing", "up/other"));
        sftp.mkdir("up/hollow");
        sftp.rmdir("up/hollow");
        sftp.rm("up/sub/one");
    }

    private void edit() throws Exception {
        sftp.put(stream("one\n"), "up/notes", ChannelSftp.OVERWRITE);
        sftp.put(stream("two\n"), "up/notes", ChannelSftp.APPEND);
        sftp.put("begun", "up/resumed", ChannelSftp.OVERWRITE);
        sftp.put("tree/large.bin", "up/resumed", ChannelSftp.RESUME);
    }

    private static InputStream stream(String text) {
        return new ByteArrayInputStream(text.getBytes(StandardCharsets.UTF_8));
    }

    /** Asks for 0 bytes whenever its buffer is full. */
    private void readWhole() throws Exception {
        for (String name : List.of("sub/20000", "large.bin")) {
            try (InputStream content = sftp.get("up/" + name)) {
                check(Arrays.equals(content.readAllBytes(), Files.readAllBytes(Path.of("tree/" + name))), name);
            }
        }
    }
}
