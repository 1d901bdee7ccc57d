// Runs fstests against the remote that the option -remote names. Debian's own file skips them.
package sftp_test

import (
	"testing"

	"github.com/rclone/rclone/backend/sftp"
	"github.com/rclone/rclone/fstest/fstests"
)

func TestIntegration(t *testing.T) {
	fstests.Run(t, &fstests.Opt{NilObject: (*sftp.Object)(nil)})
}
