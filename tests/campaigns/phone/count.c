/* A plugin for QEMU's emulator of programs: how many instructions ran until each call of write.

   What it needs of qemu-plugin.h, API version 1 (QEMU 4.2 to 8.2), which Debian does not package. */
#include <stdint.h>
#include <stdio.h>

typedef uint64_t plugin_id;
struct qemu_plugin_tb;
enum operation { ADD_U64 };
typedef void translated_cb(plugin_id, struct qemu_plugin_tb *);
typedef void called_cb(plugin_id, unsigned, int64_t, uint64_t, uint64_t, uint64_t, uint64_t,
                       uint64_t, uint64_t, uint64_t, uint64_t);
void qemu_plugin_register_vcpu_tb_trans_cb(plugin_id, translated_cb *);
void qemu_plugin_register_vcpu_tb_exec_inline(
    struct qemu_plugin_tb *, enum operation, void *, uint64_t);
void qemu_plugin_register_vcpu_syscall_cb(plugin_id, called_cb *);
uint64_t qemu_plugin_tb_n_insns(const struct qemu_plugin_tb *);

enum { WRITE = 64, OUTPUT = 1 }; /* Linux on aarch64 */
int qemu_plugin_version = 1;
static uint64_t count;

static void translated(plugin_id id, struct qemu_plugin_tb *block) {
  qemu_plugin_register_vcpu_tb_exec_inline(
      block, ADD_U64, &count, qemu_plugin_tb_n_insns(block));
}

static void called(plugin_id id, unsigned cpu, int64_t number, uint64_t descriptor, uint64_t b,
                   uint64_t c, uint64_t d, uint64_t e, uint64_t f, uint64_t g, uint64_t h) {
  if (number == WRITE && descriptor == OUTPUT) {
    fprintf(stderr, "instructions %llu\n", (unsigned long long)count);
  }
}

int qemu_plugin_install(plugin_id id, const void *info, int argc, char **argv) {
  qemu_plugin_register_vcpu_tb_trans_cb(id, translated);
  qemu_plugin_register_vcpu_syscall_cb(id, called);
  return 0;
}
