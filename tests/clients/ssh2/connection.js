// A connection of ssh2, for the server and user of the test's arguments.
'use strict';

const fs = require('node:fs');
const { Client } = require('ssh2');

const [port, knownHosts, key, password, ...rest] = process.argv.slice(2);

/** Is this the blob of a key in known_hosts? */
function isKnown(blob) {
  const lines = fs.readFileSync(knownHosts, 'utf8').trim().split('\n');
  return lines.some((line) => line.split(' ')[2] === blob.toString('base64'));
}

/** The options of a login with the key, or with the password. */
function loginOptions(proof) {
  const options = { host: '127.0.0.1', port: Number(port), username: 'alice', hostVerifier: isKnown };
  return proof.key ? { ...options, privateKey: fs.readFileSync(key) } : { ...options, password };
}

/** Resolves to a connection and its SFTP session. */
function connect(proof) {
  return new Promise((resolve, reject) => {
    const client = new Client();
    client.on('error', reject);
    client.on('ready', () => {
      client.sftp((error, sftp) => (error ? reject(error) : resolve({ client, sftp })));
    });
    client.connect(loginOptions(proof));
  });
}

module.exports = { connect, loginOptions, args: rest };
