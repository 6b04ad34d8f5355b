// Names of Android's C library that Debian's lacks or numbers otherwise, for libexecutorch.so.
// Its other names, and the layout of what they take, are the same on x86-64.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

char __sF[3][256];  // of stdin, stdout and stderr, which older programs write to by address

int* __errno(void) { return &errno; }
char* __gnu_strerror_r(int code, char* text, size_t size) { return strerror_r(code, text, size); }
size_t __strlen_chk(const char* text, size_t size) { (void)size; return strlen(text); }
char* __strchr_chk(const char* text, int c, size_t size) { (void)size; return strchr(text, c); }
char* __strrchr_chk(const char* text, int c, size_t size) { (void)size; return strrchr(text, c); }
ssize_t __write_chk(int file, const void* data, size_t count, size_t size) {
  (void)size;
  return write(file, data, count);
}
int __system_property_get(const char* name, char* value) {
  (void)name;
  return *value = 0;
}
void android_set_abort_message(const char* text) { fprintf(stderr, "%s\n", text); }
void __assert2(const char* file, int line, const char* function, const char* text) {
  fprintf(stderr, "%s:%d: %s: %s\n", file, line, function, text);
  abort();
}
int __android_log_vprint(int level, const char* tag, const char* format, va_list given) {
  (void)level;
  fprintf(stderr, "%s: ", tag);
  vfprintf(stderr, format, given);
  return fputc('\n', stderr);
}
int __android_log_print(int level, const char* tag, const char* format, ...) {
  va_list given;
  va_start(given, format);
  const int done = __android_log_vprint(level, tag, format, given);
  va_end(given);
  return done;
}
int __android_log_write(int level, const char* tag, const char* text) {
  return __android_log_print(level, tag, "%s", text);
}

// Android's numbers of what is asked; all others are taken as Debian's, whose library asks too.
long sysconf(int name) {
  static long (*next)(int);
  if (!next) {
    next = (long (*)(int))dlsym(RTLD_NEXT, "sysconf");
  }
  switch (name) {
    case 39: case 40: return next(_SC_PAGESIZE);
    case 96: return next(_SC_NPROCESSORS_CONF);
    case 97: return next(_SC_NPROCESSORS_ONLN);
    default: return next(name);
  }
}
