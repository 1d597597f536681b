import { KvmError } from '../errors.ts';
import { ERRNO, O_CLOEXEC, O_RDWR } from '../uapi.ts';
import { typeError } from '../validate.ts';
import { Vm } from '../vm.ts';

const DEVICE = '/dev/liveupdate';

/**
 * Has the kernel keep a VM's memory across kexec. No host that has what it takes has been seen yet, so it says what is missing and does nothing.
 *
 * @throws KvmError `UNSUPPORTED` the host has no /dev/liveupdate (CONFIG_LIVEUPDATE, Linux 6.19, booted with kho=on), or it has one whose
 *   sessions this library does not speak · `ERR_CLOSED`
 */
export function preserveAcrossKexec(vm: Vm): never {
  if (!(vm instanceof Vm)) throw typeError('vm must be a Vm');
  const { kernel, assertOpen } = vm.backing;
  assertOpen();
  const fd = kernel.open(DEVICE, O_RDWR | O_CLOEXEC);
  if (fd >= 0) kernel.close(fd);
  const missing = fd === -ERRNO.ENOENT || fd === -ERRNO.ENODEV;
  throw KvmError.unsupported(
    missing
      ? `there is no ${DEVICE}: memory outlives a kexec on kernels with CONFIG_LIVEUPDATE (Linux 6.19) that were booted with kho=on`
      : `${DEVICE} is there, but this library does not speak its sessions: hand the memory over to a successor on the same kernel`,
  );
}
