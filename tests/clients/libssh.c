/* Logs in with libssh, with a key as the first request of all, puts a file and gets it back.
 *
 * Arguments: port, known_hosts, key, a file, its name on the server, where to put what comes back. */

#include <fcntl.h>
#include <libssh/libssh.h>
#include <libssh/sftp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static ssh_session session;

/* Ends with libssh's own words unless something holds. */
static void check(int holds, const char *what) {
    if (!holds) {
        fprintf(stderr, "%s: %s\n", what, ssh_get_error(session));
        exit(1);
    }
}

static void put(sftp_session sftp, const char *from, const char *to) {
    char block[16384];
    size_t length;
    FILE *in = fopen(from, "rb");
    check(in != NULL, "open the file");
    sftp_file out = sftp_open(sftp, to, O_WRONLY | O_CREAT | O_TRUNC, 0644);
    check(out != NULL, "open for writing");
    while ((length = fread(block, 1, sizeof block, in)) > 0)
        check(sftp_write(out, block, length) == (ssize_t)length, "write");
    check(sftp_close(out) == SSH_OK, "close");
    fclose(in);
}

static void get(sftp_session sftp, const char *from, const char *to) {
    char block[16384];
    ssize_t length;
    FILE *out = fopen(to, "wb");
    check(out != NULL, "create the file");
    sftp_file in = sftp_open(sftp, from, O_RDONLY, 0);
    check(in != NULL, "open for reading");
    while ((length = sftp_read(in, block, sizeof block)) > 0)
        fwrite(block, 1, (size_t)length, out);
    check(length == 0, "read");
    check(sftp_close(in) == SSH_OK, "close");
    fclose(out);
}

int main(int argc, char **argv) {
    unsigned int port;
    ssh_key key;
    if (argc != 7)
        return 2;
    session = ssh_new();
    port = (unsigned int)atoi(argv[1]);
    ssh_options_set(session, SSH_OPTIONS_HOST, "127.0.0.1");
    ssh_options_set(session, SSH_OPTIONS_PORT, &port);
    ssh_options_set(session, SSH_OPTIONS_USER, "alice");
    ssh_options_set(session, SSH_OPTIONS_KNOWNHOSTS, argv[2]);
    check(ssh_connect(session) == SSH_OK, "connect");
    check(ssh_session_is_known_server(session) == SSH_KNOWN_HOSTS_OK, "host key");
    check(ssh_pki_import_privkey_file(argv[3], NULL, NULL, NULL, &key) == SSH_OK, "key");
    check(ssh_userauth_publickey(session, NULL, key) == SSH_AUTH_SUCCESS, "login");
    sftp_session sftp = sftp_new(session);
    check(sftp != NULL && sftp_init(sftp) == SSH_OK, "sftp");
    put(sftp, argv[4], argv[5]);
    get(sftp, argv[5], argv[6]);
    sftp_free(sftp);
    ssh_disconnect(session);
    ssh_free(session);
    return 0;
}
