// Uploads a local file many times with ssh2's fastPut, and prints a line for each one that failed.
//
// Arguments after the login's: the local file, the remote names' beginning, how many, and
// fastPut's `concurrency` (0 for its default).
'use strict';

const { promisify } = require('node:util');
const { connect, args } = require('./connection');

async function main() {
  const [local, remote, count, concurrency] = args;
  const options = Number(concurrency) > 0 ? { concurrency: Number(concurrency) } : {};
  const { client, sftp } = await connect({ key: true });
  for (let number = 0; number < Number(count); number += 1) {
    try {
      await promisify(sftp.fastPut).call(sftp, local, `${remote}${number}`, options);
    } catch (error) {
      console.log(`${remote}${number}: ${error.message}`);
    }
  }
  client.end();
}

main().catch((error) => {
  console.error(error);
  process.exit(1);
});
