# Logs in with Net::SFTP, puts a file and gets it back.
#
# Arguments: port, known_hosts, "key" or "password", the key's file or the password, a file, its name on the server,
# where to put what comes back.

require "net/sftp"

port, known_hosts, method, credential, file, name, back = ARGV
options = {
  port: port.to_i,
  user_known_hosts_file: known_hosts,
  global_known_hosts_file: "/dev/null",
  verify_host_key: :always,
  non_interactive: true,
  use_agent: false,
  config: false,
}
case method
when "key"
  options.merge!(auth_methods: ["publickey"], keys: [credential], keys_only: true)
when "password"
  options.merge!(auth_methods: ["password"], password: credential)
end
Net::SFTP.start("127.0.0.1", "alice", **options) do |sftp|
  sftp.upload!(file, name)
  sftp.download!(name, back)
end
