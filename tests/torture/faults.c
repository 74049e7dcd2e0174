/* Preloaded into a process: lets the n-th operation on files below a folder fail, or kills the process there.
 *
 * arm(prefix, n, mode): mode 0 kills before operation n; 1 writes half of it first where it is a write; 2 makes
 * operation n and all later ones that need space fail with ENOSPC; 3 all later ones that need permission with EACCES;
 * 4 fails operation n alone with EIO. n = 0 only counts. count(): operations seen since arm. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

static char prefix[4096];
static long wanted, seen;
static int mode = -1;

void arm(const char *folder, long n, int how) {
    snprintf(prefix, sizeof prefix, "%s", folder);
    wanted = n;
    seen = 0;
    mode = how;
}

long count(void) { return seen; }

static int ours(const char *path) { return mode >= 0 && path && strncmp(path, prefix, strlen(prefix)) == 0; }

static int ours_fd(int fd) {
    if (mode < 0) return 0;
    char link[64], path[4096];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, path, sizeof path - 1);
    if (n <= 0) return 0;
    path[n] = 0;
    return ours(path);
}

enum { SPACE = 1, PERMISSION = 2 };

/* Whether this operation must fail (errno is set); in mode 1 a write comes back with 2 to be cut in half. */
static int hit(int needs, int is_write) {
    seen++;
    if (wanted == 0) return 0;
    if (mode == 0 && seen == wanted) kill(getpid(), SIGKILL);
    if (mode == 1 && seen == wanted) {
        if (is_write) return 2;
        kill(getpid(), SIGKILL);
    }
    if (mode == 2 && seen >= wanted && (needs & SPACE)) return errno = ENOSPC, 1;
    if (mode == 3 && seen >= wanted && (needs & PERMISSION)) return errno = EACCES, 1;
    if (mode == 4 && seen == wanted) return errno = EIO, 1;
    return 0;
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

ssize_t write(int fd, const void *data, size_t size) {
    if (ours_fd(fd)) {
        int verdict = hit(SPACE, 1);
        if (verdict == 2) {
            REAL(write)(fd, data, size / 2);
            kill(getpid(), SIGKILL);
        }
        if (verdict) return -1;
    }
    return REAL(write)(fd, data, size);
}

ssize_t writev(int fd, const struct iovec *parts, int n) {
    if (ours_fd(fd) && hit(SPACE, 0)) return -1;
    return REAL(writev)(fd, parts, n);
}

ssize_t pwrite64(int fd, const void *data, size_t size, off64_t at) {
    if (ours_fd(fd) && hit(SPACE, 0)) return -1;
    return REAL(pwrite64)(fd, data, size, at);
}

ssize_t sendfile64(int out, int in, off64_t *at, size_t size) {
    if (ours_fd(out) && hit(SPACE, 0)) return -1;
    ssize_t (*real)(int, int, off64_t *, size_t) = dlsym(RTLD_NEXT, "sendfile64");
    return real(out, in, at, size);
}

ssize_t copy_file_range(int in, off64_t *from, int out, off64_t *to, size_t size, unsigned flags) {
    if (ours_fd(out) && hit(SPACE, 0)) return -1;
    return REAL(copy_file_range)(in, from, out, to, size, flags);
}

int fsync(int fd) { return ours_fd(fd) && hit(0, 0) ? -1 : REAL(fsync)(fd); }
int fdatasync(int fd) { return ours_fd(fd) && hit(0, 0) ? -1 : REAL(fdatasync)(fd); }

int ftruncate64(int fd, off64_t size) { return ours_fd(fd) && hit(SPACE, 0) ? -1 : REAL(ftruncate64)(fd, size); }

int rename(const char *from, const char *to) {
    return (ours(from) || ours(to)) && hit(PERMISSION, 0) ? -1 : REAL(rename)(from, to);
}

int renameat(int a, const char *from, int b, const char *to) {
    return (ours(from) || ours(to)) && hit(PERMISSION, 0) ? -1 : REAL(renameat)(a, from, b, to);
}

int mkdir(const char *path, mode_t bits) {
    return ours(path) && hit(SPACE | PERMISSION, 0) ? -1 : REAL(mkdir)(path, bits);
}

int unlink(const char *path) { return ours(path) && hit(PERMISSION, 0) ? -1 : REAL(unlink)(path); }
int rmdir(const char *path) { return ours(path) && hit(PERMISSION, 0) ? -1 : REAL(rmdir)(path); }

/* shutil.rmtree removes by name below an open folder. */
int unlinkat(int folder, const char *path, int flags) {
    return (ours(path) || ours_fd(folder)) && hit(PERMISSION, 0) ? -1 : REAL(unlinkat)(folder, path, flags);
}

static int opens(const char *path, int flags) {
    return (flags & (O_CREAT | O_WRONLY | O_RDWR)) && ours(path) ? hit(SPACE | PERMISSION, 0) : 0;
}

int open64(const char *path, int flags, ...) {
    va_list rest;
    va_start(rest, flags);
    mode_t bits = va_arg(rest, mode_t);
    va_end(rest);
    int (*real)(const char *, int, ...) = dlsym(RTLD_NEXT, "open64");
    return opens(path, flags) == 1 ? -1 : real(path, flags, bits);
}

int open(const char *path, int flags, ...) {
    va_list rest;
    va_start(rest, flags);
    mode_t bits = va_arg(rest, mode_t);
    va_end(rest);
    int (*real)(const char *, int, ...) = dlsym(RTLD_NEXT, "open");
    return opens(path, flags) == 1 ? -1 : real(path, flags, bits);
}
