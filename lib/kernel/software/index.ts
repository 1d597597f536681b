import { agentExecutors } from '../../agent/executor.ts';
import type { ModelOptions } from '../../model_options.ts';
import { SoftwareKernel } from './software_kernel.ts';
import { unicornExecutors } from './unicorn_executor.ts';

/**
 * A kernel of its own, in this process: no state is shared between two calls, and nothing of the host is touched, except files opened
 * by path. It answers as the Linux version, architecture and page size of `model` do, errno for errno.
 *
 * @throws RangeError `ERR_OUT_OF_RANGE` for a version, architecture or combination that the model does not play
 */
export function softwareKernel(model: ModelOptions = {}): SoftwareKernel {
  const kernel = new SoftwareKernel(model);
  kernel.addExecutor(agentExecutors);
  kernel.addExecutor(unicornExecutors);
  return kernel;
}
