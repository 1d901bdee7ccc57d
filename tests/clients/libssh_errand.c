/* The errand of tests/interop.rs with libssh. */
#include <dirent.h>
#include <fcntl.h>
#include <libssh/libssh.h>
#include <libssh/sftp.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define CHUNK 32768

static ssh_session session;
static sftp_session sftp;

#define CHECK(holds) \
	do { \
		if (!(holds)) { \
			fprintf(stderr, "line %d: %s: %s; status %d\n", __LINE__, #holds, ssh_get_error(session), \
				sftp ? sftp_get_error(sftp) : 0); \
			exit(1); \
		} \
	} while (0)

#define FAILS(code, call) \
	do { \
		CHECK(!(call)); \
		CHECK(sftp_get_error(sftp) == (code)); \
	} while (0)

static void login(const char *port, const char *known_hosts, const char *key, const char *password)
{
	int number = atoi(port), nodelay = 1;
	session = ssh_new();
	sftp = NULL;
	ssh_options_set(session, SSH_OPTIONS_HOST, "127.0.0.1");
	ssh_options_set(session, SSH_OPTIONS_PORT, &number);
	ssh_options_set(session, SSH_OPTIONS_USER, "alice");
	ssh_options_set(session, SSH_OPTIONS_KNOWNHOSTS, known_hosts);
	/* Otherwise each WRITE waits 40 ms for the acknowledgement of its first half. */
	ssh_options_set(session, SSH_OPTIONS_NODELAY, &nodelay);
	CHECK(ssh_connect(session) == SSH_OK);
	CHECK(ssh_session_is_known_server(session) == SSH_KNOWN_HOSTS_OK);
	if (key) {
		ssh_key private_key;
		CHECK(ssh_pki_import_privkey_file(key, NULL, NULL, NULL, &private_key) == SSH_OK);
		CHECK(ssh_userauth_publickey(session, NULL, private_key) == SSH_AUTH_SUCCESS);
		ssh_key_free(private_key);
	} else {
		CHECK(ssh_userauth_password(session, NULL, password) == SSH_AUTH_SUCCESS);
	}
	sftp = sftp_new(session);
	CHECK(sftp && sftp_init(sftp) == SSH_OK);
}

static void logout(void)
{
	sftp_free(sftp);
	ssh_disconnect(session);
	ssh_free(session);
}

static int is_dot(const char *name)
{
	return !strcmp(name, ".") || !strcmp(name, "..");
}

static void join(char *path, const char *directory, const char *name)
{
	CHECK(snprintf(path, PATH_MAX, "%s/%s", directory, name) < PATH_MAX);
}

/* Writes a local file from an offset on, where the remote one may have begun. */
static void put(const char *local, const char *remote, int flags, long from)
{
	static char buffer[CHUNK];
	size_t got;
	FILE *file = fopen(local, "rb");
	sftp_file target = sftp_open(sftp, remote, flags, 0644);
	CHECK(file && target);
	CHECK(!fseek(file, from, SEEK_SET) && !sftp_seek64(target, from));
	while ((got = fread(buffer, 1, sizeof buffer, file)) > 0)
		CHECK(sftp_write(target, buffer, got) == (ssize_t)got);
	CHECK(sftp_close(target) == SSH_OK);
	fclose(file);
}

static void get(const char *remote, const char *local)
{
	static char buffer[CHUNK];
	ssize_t got;
	FILE *file = fopen(local, "wb");
	sftp_file source = sftp_open(sftp, remote, O_RDONLY, 0);
	CHECK(file && source);
	while ((got = sftp_read(source, buffer, sizeof buffer)) > 0)
		CHECK(fwrite(buffer, 1, got, file) == (size_t)got);
	CHECK(got == 0 && !sftp_close(source) && !fclose(file));
}

/* The number of files and directories below. */
static int copy_up(const char *local, const char *remote)
{
	char from[PATH_MAX], to[PATH_MAX];
	struct dirent *entry;
	struct stat about;
	int count = 0;
	DIR *directory = opendir(local);
	CHECK(directory && !sftp_mkdir(sftp, remote, 0755));
	while ((entry = readdir(directory))) {
		if (is_dot(entry->d_name))
			continue;
		count++;
		join(from, local, entry->d_name);
		join(to, remote, entry->d_name);
		CHECK(!stat(from, &about));
		if (S_ISDIR(about.st_mode)) {
			count += copy_up(from, to);
			continue;
		}
		put(from, to, O_WRONLY | O_CREAT | O_TRUNC, 0);
		sftp_attributes attributes = sftp_stat(sftp, to);
		CHECK(attributes && attributes->size == (uint64_t)about.st_size);
		sftp_attributes_free(attributes);
	}
	closedir(directory);
	return count;
}

static int copy_down(const char *remote, const char *local)
{
	char from[PATH_MAX], to[PATH_MAX];
	sftp_attributes entry;
	int count = 0;
	sftp_dir directory = sftp_opendir(sftp, remote);
	CHECK(directory && !mkdir(local, 0755));
	while ((entry = sftp_readdir(sftp, directory))) {
		if (!is_dot(entry->name)) {
			count++;
			join(from, remote, entry->name);
			join(to, local, entry->name);
			if (entry->type == SSH_FILEXFER_TYPE_DIRECTORY)
				count += copy_down(from, to);
			else
				get(from, to);
		}
		sftp_attributes_free(entry);
	}
	CHECK(sftp_dir_eof(directory) && !sftp_closedir(directory));
	return count;
}

static void manage(void)
{
	CHECK(!sftp_rename(sftp, "up/hello.txt", "up/renamed"));
	FAILS(SSH_FX_FAILURE, !sftp_rename(sftp, "up/renamed", "up/empty"));
	FAILS(SSH_FX_FAILURE, !sftp_rmdir(sftp, "up/sub"));
	/* libssh looks what is there, and says so. */
	FAILS(SSH_FX_FILE_ALREADY_EXISTS, !sftp_mkdir(sftp, "up/sub", 0755));
	FAILS(SSH_FX_NO_SUCH_FILE, sftp_stat(sftp, "up/missing"));
	FAILS(SSH_FX_NO_SUCH_FILE, sftp_open(sftp, "up/missing", O_RDONLY, 0));
	FAILS(SSH_FX_NO_SUCH_FILE, !sftp_unlink(sftp, "up/missing"));
	FAILS(SSH_FX_NO_SUCH_FILE, sftp_opendir(sftp, "up/missing"));
	FAILS(SSH_FX_NO_SUCH_FILE, !sftp_rename(sftp, "up/missing", "up/other"));
	CHECK(strstr(ssh_get_error(session), "No such file"));
	CHECK(!sftp_mkdir(sftp, "up/hollow", 0755) && !sftp_rmdir(sftp, "up/hollow"));
	CHECK(!sftp_unlink(sftp, "up/sub/one"));
}

static void edit(void)
{
	struct stat begun;
	sftp_file notes = sftp_open(sftp, "up/notes", O_WRONLY | O_CREAT, 0644);
	CHECK(notes && sftp_write(notes, "one\n", 4) == 4 && !sftp_close(notes));
	notes = sftp_open(sftp, "up/notes", O_WRONLY | O_APPEND, 0);
	CHECK(notes && sftp_write(notes, "two\n", 4) == 4 && !sftp_close(notes));
	CHECK(!stat("begun", &begun));
	put("begun", "up/resumed", O_WRONLY | O_CREAT | O_TRUNC, 0);
	put("tree/large.bin", "up/resumed", O_WRONLY, begun.st_size);
}

/* A read of no bytes is not the end of the file: libssh remembers an end, and reads nothing more. */
static void read_nothing(void)
{
	static char expected[20000], got[20000];
	size_t at = 0;
	FILE *local = fopen("tree/sub/20000", "rb");
	sftp_file remote = sftp_open(sftp, "up/sub/20000", O_RDONLY, 0);
	CHECK(local && remote && fread(expected, 1, sizeof expected, local) == sizeof expected);
	while (at < sizeof got) {
		size_t wanted = sizeof got - at < 8192 ? sizeof got - at : 8192;
		ssize_t length = sftp_read(remote, got + at, wanted);
		CHECK(length > 0);
		at += length;
		CHECK(sftp_read(remote, got, 0) == 0);
	}
	CHECK(!memcmp(expected, got, sizeof got));
	CHECK(!sftp_close(remote) && !fclose(local));
}

int main(int argc, char **argv)
{
	(void)argc;
	login(argv[1], argv[2], NULL, argv[4]);
	logout();
	login(argv[1], argv[2], argv[3], NULL);
	int sent = copy_up("tree", "up");
	CHECK(copy_down("up", "down") == sent);
	manage();
	edit();
	read_nothing();
	logout();
	return 0;
}
