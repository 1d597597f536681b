import { createHash } from 'node:crypto';
import type { Arch } from '../../lib/model_options.ts';

/** What a machine's kernel has on top of `make tinyconfig`: enough for Node, 9p and KVM, so that it builds in minutes. */

const common = `
64BIT EXPERT SMP PRINTK BUG MULTIUSER FILE_LOCKING SYSVIPC
TTY VT=n UNIX98_PTYS SERIAL_CORE HVC_DRIVER VIRTIO_CONSOLE
BLOCK BINFMT_ELF BINFMT_SCRIPT COREDUMP=n
PROC_FS SYSCTL PROC_PAGE_MONITOR SYSFS DEVTMPFS DEVTMPFS_MOUNT TMPFS SHMEM MEMFD_CREATE HUGETLBFS
TRANSPARENT_HUGEPAGE TRANSPARENT_HUGEPAGE_MADVISE COMPACTION MIGRATION KSM NUMA USERFAULTFD MEMORY_FAILURE SECRETMEM
FUTEX EPOLL EVENTFD SIGNALFD TIMERFD AIO IO_URING ADVISE_SYSCALLS CACHESTAT_SYSCALL MEMBARRIER RSEQ INOTIFY_USER FHANDLE
POSIX_TIMERS HIGH_RES_TIMERS NO_HZ_IDLE CROSS_MEMORY_ATTACH CHECKPOINT_RESTORE
NET UNIX INET PCI VIRTIO_MENU VIRTIO_PCI NETWORK_FILESYSTEMS NET_9P NET_9P_VIRTIO 9P_FS
CC_OPTIMIZE_FOR_PERFORMANCE PANIC_ON_OOPS
VIRTUALIZATION KVM`;

const perArch: Record<Arch, string> = {
  x86_64: `ACPI CPU_SUP_AMD X86_MSR X86_MCE SERIAL_8250 SERIAL_8250_CONSOLE
    RELOCATABLE=n KVM_AMD KVM_SMM KVM_SW_PROTECTED_VM X86_64_ACPI_NUMA CPU_MITIGATIONS=n`,
  aarch64: `SERIAL_AMBA_PL011 SERIAL_AMBA_PL011_CONSOLE PCI_HOST_GENERIC VIRTIO_MMIO CPU_MITIGATIONS=n`,
};

/** The lines to put after tinyconfig's. */
export function kernelConfig(arch: Arch): string {
  const options = `${common} ${perArch[arch]}`.trim().split(/\s+/);
  return `${options.map((option) => `CONFIG_${option}${option.includes('=') ? '' : '=y'}`).join('\n')}\n`;
}

/** Options that the kernel was asked for and does not have. */
export function missingOptions(arch: Arch, config: string): string[] {
  const lines = new Set(config.split('\n'));
  return kernelConfig(arch)
    .split('\n')
    .filter((line) => line.endsWith('=y') && !lines.has(line));
}

export function configHash(arch: Arch): string {
  return createHash('sha256').update(kernelConfig(arch)).digest('hex').slice(0, 12);
}
