// The errand of tests/interop.rs with Go's github.com/pkg/sftp.
package main

import (
	"errors"
	"io"
	"io/fs"
	"log"
	"os"
	"path/filepath"
	"reflect"
	"sort"
	"strings"

	"github.com/pkg/sftp"
	"golang.org/x/crypto/ssh"
	"golang.org/x/crypto/ssh/knownhosts"
)

// The codes of the protocol, which the package does not export.
const sshFxFailure = 4

func main() {
	log.SetFlags(log.Lshortfile)
	port, knownHosts, key, password := os.Args[1], os.Args[2], os.Args[3], os.Args[4]

	client := login(port, knownHosts, ssh.Password(password))
	entries, err := client.ReadDir("/")
	must(err)
	if len(entries) != 0 {
		log.Fatal("the home is not empty: ", entries)
	}
	must(client.Close())

	text, err := os.ReadFile(key)
	must(err)
	signer, err := ssh.ParsePrivateKey(text)
	must(err)
	client = login(port, knownHosts, ssh.PublicKeys(signer))
	copyUp(client)
	copyDown(client)
	manage(client)
	edit(client)
	must(client.Close())
}

func must(err error) {
	if err != nil {
		_ = log.Output(2, err.Error())
		os.Exit(1)
	}
}

func login(port, knownHosts string, proof ssh.AuthMethod) *sftp.Client {
	check, err := knownhosts.New(knownHosts)
	must(err)
	config := ssh.ClientConfig{User: "alice", Auth: []ssh.AuthMethod{proof}, HostKeyCallback: check}
	connection, err := ssh.Dial("tcp", "127.0.0.1:"+port, &config)
	must(err)
	client, err := sftp.NewClient(connection, sftp.UseConcurrentWrites(true))
	must(err)
	return client
}

// below is the path of a local file below another directory.
func below(directory, path string) string {
	return directory + strings.TrimPrefix(path, "tree")
}

func copyUp(client *sftp.Client) {
	must(filepath.WalkDir("tree", func(path string, entry fs.DirEntry, err error) error {
		must(err)
		if entry.IsDir() {
			return client.Mkdir(below("up", path))
		}
		local, err := os.Open(path)
		must(err)
		remote, err := client.Create(below("up", path))
		must(err)
		sent, err := remote.ReadFrom(local)
		must(err)
		must(remote.Close())
		info, err := client.Stat(below("up", path))
		must(err)
		if info.Size() != sent || !info.Mode().IsRegular() {
			log.Fatal(path, ": ", info)
		}
		return local.Close()
	}))
}

func copyDown(client *sftp.Client) {
	var local, remote []string
	must(filepath.WalkDir("tree", func(path string, _ fs.DirEntry, err error) error {
		local = append(local, below("up", path))
		return err
	}))
	walker := client.Walk("up")
	for walker.Step() {
		must(walker.Err())
		path := walker.Path()
		remote = append(remote, path)
		target := "down" + strings.TrimPrefix(path, "up")
		if walker.Stat().IsDir() {
			must(os.Mkdir(target, 0o777))
			continue
		}
		from, err := client.Open(path)
		must(err)
		to, err := os.Create(target)
		must(err)
		_, err = from.WriteTo(to)
		must(err)
		must(from.Close())
		must(to.Close())
	}
	sort.Strings(local)
	sort.Strings(remote)
	if !reflect.DeepEqual(local, remote) {
		log.Fatal("listed: ", remote)
	}
}

// failed is a status with that code, and OpenSSH's words for it first.
func failed(err error, code uint32, words string) {
	var status *sftp.StatusError
	if !errors.As(err, &status) || status.Code != code || !strings.Contains(status.Error(), words) {
		_ = log.Output(2, "not the failure expected: "+reflect.TypeOf(&err).String())
		log.Fatal(err)
	}
}

// missing is what the package makes of SSH_FX_NO_SUCH_FILE.
func missing(err error) {
	if !errors.Is(err, os.ErrNotExist) {
		_ = log.Output(2, "not the failure expected")
		log.Fatal(err)
	}
}

func manage(client *sftp.Client) {
	must(client.Rename("up/hello.txt", "up/renamed"))
	failed(client.Rename("up/renamed", "up/empty"), sshFxFailure, "Failure")
	failed(client.RemoveDirectory("up/sub"), sshFxFailure, "Failure")
	failed(client.Mkdir("up/sub"), sshFxFailure, "Failure")
	_, err := client.Stat("up/missing")
	missing(err)
	_, err = client.Open("up/missing")
	missing(err)
	_, err = client.ReadDir("up/missing")
	missing(err)
	missing(client.Remove("up/missing"))
	missing(client.Rename("up/missing", "up/other"))
	must(client.MkdirAll("up/hollow/deep"))
	must(client.RemoveDirectory("up/hollow/deep"))
	must(client.Remove("up/hollow"))
	must(client.Remove("up/sub/one"))
}

func edit(client *sftp.Client) {
	for _, line := range []string{"one\n", "two\n"} {
		notes, err := client.OpenFile("up/notes", os.O_WRONLY|os.O_CREATE|os.O_APPEND)
		must(err)
		_, err = notes.Write([]byte(line))
		must(err)
		must(notes.Close())
	}

	resumed, err := client.Create("up/resumed")
	must(err)
	begun, err := os.ReadFile("begun")
	must(err)
	_, err = resumed.Write(begun)
	must(err)
	must(resumed.Close())
	resumed, err = client.OpenFile("up/resumed", os.O_WRONLY)
	must(err)
	local, err := os.Open("tree/large.bin")
	must(err)
	_, err = local.Seek(int64(len(begun)), io.SeekStart)
	must(err)
	_, err = resumed.Seek(int64(len(begun)), io.SeekStart)
	must(err)
	_, err = resumed.ReadFrom(local)
	must(err)
	must(resumed.Close())
}
