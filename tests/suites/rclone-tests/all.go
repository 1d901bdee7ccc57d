// Package all replaces rclone's list of all its backends by those that the tests name, which spares minutes of building.
package all

import (
	_ "github.com/rclone/rclone/backend/local"
	_ "github.com/rclone/rclone/backend/sftp"
)
