/* The calls of vmanager.c. Read by cffi after vmanager_cdef.h and included by C after uapi/vmanager.h: one text for both. */

/* Each returns 0 or -errno, sets `size` itself and allocates nothing. A call may wait for the firmware or for a guest. */
int eh_vman_info(int fd, struct vman_info *info);
/* On success the descriptor in `fd`, if any, is the caller's. */
int eh_vman_create(int fd, struct vman_create *create);
int eh_vman_destroy(int fd, uint32_t id);
/* The partition's descriptor or -errno. */
int eh_vman_open(int fd, uint32_t id);
/* Replaces *id by the smallest larger id that exists. */
int eh_vman_next(int fd, uint32_t *id);
int eh_vman_deploy(int fd, struct vman_deploy *deploy);
int eh_vman_status(int fd, struct vman_status *status);
/* One of VMAN_SHUTDOWN, REBOOT, SUSPEND, RESTORE, SCRUB; *state is the state after the call where the driver told it. */
int eh_vman_ctl(int fd, uint32_t request, uint32_t flags, uint32_t timeout_ms, uint32_t *state);
