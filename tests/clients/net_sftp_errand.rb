# The errand of tests/interop.rs with Ruby's net-sftp.

require 'fileutils'
require 'net/sftp'

PORT, KNOWN_HOSTS, KEY, PASSWORD = ARGV

NO_SUCH_FILE = Net::SFTP::Constants::StatusCodes::FX_NO_SUCH_FILE
FAILURE = Net::SFTP::Constants::StatusCodes::FX_FAILURE

def login(options, &work)
  common = { port: PORT.to_i, user_known_hosts_file: KNOWN_HOSTS, verify_host_key: :always,
             non_interactive: true, use_agent: false, config: false }
  Net::SFTP.start('127.0.0.1', 'alice', common.merge(options), &work)
end

def check(holds, what)
  raise what unless holds
end

# The call must fail with that code and those words.
def fails(code, words)
  yield
rescue Net::SFTP::StatusException => e
  check(e.code == code && e.message.include?(words), "#{e.code}: #{e.message}")
else
  raise "should have failed: #{words}"
end

login(password: PASSWORD, auth_methods: ['password'], keys: []) do |sftp|
  check(sftp.dir.entries('/').map(&:name).reject { |name| name.start_with?('.') }.empty?, 'an empty home')
end

login(keys: [KEY], keys_only: true, auth_methods: ['publickey']) do |sftp|
  sftp.mkdir!('up')
  sftp.upload!('tree', 'up')
  sftp.download!('up', 'down', recursive: true)

  local = Dir.glob('**/*', File::FNM_DOTMATCH, base: 'tree').reject { |name| File.basename(name) == '.' }
  remote = sftp.dir.glob('up', '**/*', File::FNM_DOTMATCH).map(&:name)
  remote = remote.reject { |name| %w[. ..].include?(File.basename(name)) }
  check(remote.map { |name| name.b }.sort == local.map { |name| name.b }.sort, "listed: #{remote}")
  local.each do |name|
    attributes = sftp.stat!("up/#{name}")
    check(attributes.directory? == File.directory?("tree/#{name}"), name)
    check(attributes.directory? || attributes.size == File.size("tree/#{name}"), name)
  end

  sftp.rename!('up/hello.txt', 'up/renamed')
  fails(FAILURE, 'failure') { sftp.rename!('up/renamed', 'up/empty') }
  fails(FAILURE, 'failure') { sftp.rmdir!('up/sub') }
  fails(FAILURE, 'failure') { sftp.mkdir!('up/sub') }
  fails(NO_SUCH_FILE, 'no such file') { sftp.stat!('up/missing') }
  fails(NO_SUCH_FILE, 'no such file') { sftp.open!('up/missing') }
  fails(NO_SUCH_FILE, 'no such file') { sftp.remove!('up/missing') }
  fails(NO_SUCH_FILE, 'no such file') { sftp.opendir!('up/missing') }
  fails(NO_SUCH_FILE, 'no such file') { sftp.rename!('up/missing', 'up/other') }
  sftp.mkdir!('up/hollow')
  sftp.rmdir!('up/hollow')
  sftp.remove!('up/sub/one')

  sftp.file.open('up/notes', 'w') { |file| file.write("one\n") }
  sftp.file.open('up/notes', 'a') { |file| file.write("two\n") }
  sftp.file.open('up/notes', 'r') { |file| check(file.read == "one\ntwo\n", 'what was appended to') }

  sftp.upload!('begun', 'up/resumed')
  begun = File.size('begun')
  rest = File.binread('tree/large.bin', nil, begun)
  handle = sftp.open!('up/resumed', 'r+')
  rest.bytes.each_slice(32_768).with_index do |slice, index|
    sftp.write!(handle, begun + index * 32_768, slice.pack('C*'))
  end
  sftp.close!(handle)
end
