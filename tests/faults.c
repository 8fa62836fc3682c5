/* Faults on command, for all that is written below one folder: loaded into a run by LD_PRELOAD, it stands between the
   program, SQLite and FAISS on one side and the system on the other. Until `faults_arm` is called it only passes on. */

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { KILL = 1, TEAR, FAIL, FAIL_ON }; /* at that call: SIGKILL before it, after half of it; an error, once or from then on */

static char root[PATH_MAX];
static int record = -1, action, error;
static long at, seen;

/* Stands for a codec with a fault: a file that begins like this is the end of whoever reads it. */
static const char deadly[] = "\x89PNG\r\n\x1a\n deadly";

/* Act at the `number`-th call (0: never) that changes what is below `folder`; put all of them down in `file` (-1: none). */
void faults_arm(const char *folder, int file, long number, int what, int code)
{
    record = file, at = number, action = what, error = code, seen = 0;
    snprintf(root, sizeof root, "%s", folder);
}

static void absolute(const char *path, char *full)
{
    char here[PATH_MAX] = "";
    if (*path != '/' && syscall(SYS_getcwd, here, sizeof here) < 0)
        *here = 0;
    snprintf(full, 2 * PATH_MAX, *path == '/' ? "%s%s" : "%s/%s", here, path);
}

static void path_of(int file, char *full)
{
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    ssize_t length = syscall(SYS_readlinkat, AT_FDCWD, link, full, PATH_MAX);
    full[length < 0 ? 0 : length] = 0;
}

static void put_down(char kind, const char *path, const char *to, int64_t offset, const void *data, int64_t length)
{
    int64_t head[5] = {kind, strlen(path), strlen(to), offset, length};
    syscall(SYS_write, record, head, sizeof head);
    syscall(SYS_write, record, path, head[1]);
    syscall(SYS_write, record, to, head[2]);
    if (data)
        syscall(SYS_write, record, data, length);
}

/* 0: go on; -1: fail, errno is set; 1: do half of it and call `die`. */
static int consider(char kind, const char *path, const char *to, int64_t offset, const void *data, int64_t length)
{
    if (!*root || strncmp(path, root, strlen(root)))
        return 0;
    if (record >= 0)
        put_down(kind, path, to, offset, data, length);
    long number = ++seen;
    if (!at || (number != at && !(action == FAIL_ON && number > at)))
        return 0;
    if (action == TEAR && kind == 'w')
        return 1;
    if (action < FAIL)
        syscall(SYS_kill, getpid(), SIGKILL);
    errno = error;
    return -1;
}

/* At this offset, or, if it is -1, where the file stands. */
static ssize_t put(int file, const void *data, size_t length, off64_t offset)
{
    char path[2 * PATH_MAX];
    int verdict = 0;
    if (*root) {
        off64_t place = offset < 0 ? syscall(SYS_lseek, file, 0, SEEK_CUR) : offset;
        path_of(file, path);
        verdict = consider('w', path, "", place, data, length);
    }
    if (verdict < 0)
        return -1;
    length = verdict ? length / 2 : length;
    ssize_t done = offset < 0 ? syscall(SYS_write, file, data, length) : syscall(SYS_pwrite64, file, data, length, offset);
    return verdict ? syscall(SYS_kill, getpid(), SIGKILL) : done;
}

ssize_t write(int file, const void *data, size_t length)
{
    return put(file, data, length, -1);
}

ssize_t pwrite64(int file, const void *data, size_t length, off64_t offset)
{
    return put(file, data, length, offset);
}

ssize_t read(int file, void *data, size_t length)
{
    ssize_t got = syscall(SYS_read, file, data, length);
    if (got >= (ssize_t)sizeof deadly && !memcmp(data, deadly, sizeof deadly - 1))
        *(volatile char *)NULL = 0;
    return got;
}

static int on_file(char kind, int file, int64_t length)
{
    char path[2 * PATH_MAX];
    if (!*root)
        return 0;
    path_of(file, path);
    return consider(kind, path, "", 0, NULL, length);
}

int fsync(int file)
{
    return on_file('s', file, 0) ? -1 : syscall(SYS_fsync, file);
}

int fdatasync(int file)
{
    return on_file('s', file, 0) ? -1 : syscall(SYS_fdatasync, file);
}

int ftruncate64(int file, off64_t length)
{
    return on_file('t', file, length) ? -1 : syscall(SYS_ftruncate, file, length);
}

static int on_path(char kind, const char *path, const char *to, int64_t flags)
{
    char full[2 * PATH_MAX], other[2 * PATH_MAX] = "";
    if (!*root)
        return 0;
    absolute(path, full);
    if (*to)
        absolute(to, other);
    return consider(kind, full, other, 0, NULL, flags);
}

int rename(const char *path, const char *to)
{
    return on_path('r', path, to, 0) ? -1 : syscall(SYS_renameat2, AT_FDCWD, path, AT_FDCWD, to, 0);
}

int unlink(const char *path)
{
    return on_path('u', path, "", 0) ? -1 : syscall(SYS_unlinkat, AT_FDCWD, path, 0);
}

int mkdir(const char *path, mode_t mode)
{
    return on_path('m', path, "", 0) ? -1 : syscall(SYS_mkdirat, AT_FDCWD, path, mode);
}

int open64(const char *path, int flags, ...)
{
    va_list rest;
    va_start(rest, flags);
    int mode = flags & (O_CREAT | __O_TMPFILE) ? va_arg(rest, int) : 0;
    va_end(rest);
    if (flags & (O_CREAT | O_TRUNC) && on_path('o', path, "", !!(flags & O_TRUNC)))
        return -1;
    return syscall(SYS_openat, AT_FDCWD, path, flags | O_LARGEFILE, mode);
}

_Static_assert(sizeof(off_t) == sizeof(off64_t), "so that these are the same");
ssize_t pwrite(int, const void *, size_t, off_t) __attribute__((alias("pwrite64")));
int ftruncate(int, off_t) __attribute__((alias("ftruncate64")));
int open(const char *, int, ...) __attribute__((alias("open64")));
